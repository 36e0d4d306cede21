"""What a cache policy sees and answers. It is index logic: it sees the canvas, never the model.

All keys and values live in one buffer indexed by position (`dkv.buffer`). What a policy does not
name keeps the keys and values of the last pass that computed it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dkv.canvas import Canvas, column
from dkv.schedule import Step


@dataclass(frozen=True)
class View:
    """What is known before a pass. Every row may be in another step of its schedule.

    Attributes:
        canvas: its tokens, and which slots are masked and fresh.
        steps: by row, the step about to run.
        planned: slots that this step will decode, where that is known beforehand: int64 [B, n] in
            the order of decoding, ragged rows filled up with S.
        masked_counts, open_counts, fresh_counts, planned_counts: int64 [B], known to the host: how many slots of
            a row are masked, masked and of the current block, fresh, and planned.
        shifted: the output of a slot predicts the next one (Dream).
    """

    canvas: Canvas
    steps: list[Step]
    planned: Tensor | None
    masked_counts: np.ndarray
    open_counts: np.ndarray
    fresh_counts: np.ndarray
    planned_counts: np.ndarray
    shifted: bool

    @property
    def slot(self) -> Tensor:
        return torch.arange(self.canvas.size, device=self.canvas.tokens.device)

    def column(self, values: Callable[[Step], int]) -> Tensor:
        """[B, 1]: a number of every row's step."""
        return column([values(step) for step in self.steps], self.canvas.tokens.device)

    def first_slots(self, starts: list[int]) -> np.ndarray:
        """int64 [B]: by row, the slot that is number `starts` of those to fill."""
        return np.array([slots[at] for slots, at in zip(self.canvas.to_fill, starts, strict=True)])

    def from_on(self, first: np.ndarray) -> "Active":
        """All slots from these [B] to the end of the row; in a shifted model also the one that predicts the first."""
        first = np.maximum(first - int(self.shifted), 0)
        start = column(first.tolist(), self.slot.device)
        return Active(self.canvas.everywhere & (self.slot >= start), self.canvas.row_lengths - first)


@dataclass(frozen=True)
class Active:
    """Slots to recompute: bool [B, S], and how many a row has at most, int64 [B], known to the host."""

    mask: Tensor
    counts: np.ndarray

    def where(self, rows: list[bool], other: "Active") -> "Active":
        """The slots of `other` in some rows."""
        if not any(rows):
            return self
        chosen = column(rows, self.mask.device)
        return Active(torch.where(chosen, other.mask, self.mask), np.where(rows, other.counts, self.counts))


def sources(slots: Tensor) -> Tensor:
    """The slots whose output predicts the slots of a mask [B, S], in a shifted model."""
    left = slots.roll(-1, 1)
    left[:, -1] = False
    left[:, 0] |= slots[:, 0]
    return left


def runs_of(slots: np.ndarray) -> int:
    """How many runs of neighbours there are in ascending slots."""
    return int((np.diff(slots, prepend=-2) > 1).sum())


class Policy(ABC):
    """Base of all policies.

    Attributes:
        name: as which `DiffusionConfig(cache=...)` and the command line know it.
        plans: the slots of a cached step must be chosen before the pass.
    """

    name: ClassVar[str]
    plans: ClassVar[bool] = False

    @abstractmethod
    def full(self, step: Step, shifted: bool) -> bool:
        """Whether the step recomputes every slot."""

    @abstractmethod
    def active(self, view: View) -> Active:
        """The slots of a pass, right for the rows in which it is not full."""

    def first_passes(self, shifted: bool) -> int:
        """Full passes before the buffer is relied on; one that is handed over spares its slots in these."""
        return 1

    def check(self, shifted: bool) -> None:  # noqa: B027, most policies go with every model
        """Raise ValueError where the policy does not go with the model."""
