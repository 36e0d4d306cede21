"""What is known of a pass through the model once it is done."""

from dataclasses import dataclass

from torch import Tensor

from dkv.policy import Active
from dkv.ragged import Ragged


@dataclass(frozen=True)
class Pass:
    """What went through the model in a step.

    Attributes:
        active: the slots computed.
        full: they were all.
        positions: [B, N] the same, ascending, filled up with S.
        hidden: [B, N, d] if `every_row`, else [B, R, d] at the rows in `place`; with guidance, of both branches
            together.
        place: [B, R] which of the N predict the slots that are scored.
        slots, confidence: [B, R] the slots that are scored, filled up with S, and the outcome; None where none was.
        scored: how many of the R count, by row.
    """

    active: Active
    full: bool
    positions: Tensor
    hidden: Tensor
    place: Tensor
    every_row: bool
    slots: Tensor
    scored: Ragged
    confidence: Tensor | None = None

    @property
    def computed(self) -> int:
        """Slots computed, all rows."""
        return int(self.active.counts.sum())
