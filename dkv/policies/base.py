"""What a cache policy sees and answers. It is index logic: it sees the state of the rows, never the model.

All keys and values live in one `dkv.core.KVCache` indexed by position. A slot that a policy does not name keeps the
key and value of the last pass that computed it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.sequences import Sequences


@dataclass(frozen=True)
class View:
    """What is known before a pass. Every row may be in another step of its schedule.

    Attributes:
        rows: their tokens, and which slots are masked and fresh.
        now: the step that every row is about to take.
        planned: slots that this step will fill, where that is known beforehand: int64 [B, n] in the order in
            which they are chosen, rows with fewer filled up with S.
        shifted: the output of a slot predicts the next one (Dream).
    """

    rows: Sequences
    now: Now
    planned: Tensor | None
    shifted: bool

    @property
    def unsettled(self) -> Tensor:
        """bool [B, S]: slots whose keys and values change: the masked ones, and those filled last."""
        return self.rows.masked | self.rows.fresh

    def from_on(self, number: Tensor | int) -> Tensor:
        """bool [B, S]: all slots of a row from the one that is `number` [B, 1] among those to fill."""
        return self.rows.everywhere & ((self.rows.rank >= number).cumsum(1) > 0)

    def with_sources(self, slots: Tensor) -> Tensor:
        """`slots` bool [B, S], and in a shifted model also those whose output predicts them."""
        return slots | sources(slots) if self.shifted else slots


def sources(slots: Tensor) -> Tensor:
    """The slots whose output predicts the slots of a mask [B, S], in a shifted model."""
    left = slots.roll(-1, 1)
    left[:, -1] = False
    left[:, 0] |= slots[:, 0]
    return left


class Policy(ABC):
    """Base of all policies.

    Attributes:
        name: as which `DiffusionConfig(cache=...)` and the command line know it.
        plans: the slots of a cached step must be chosen before the pass.
    """

    name: ClassVar[str]
    plans: ClassVar[bool] = False

    @abstractmethod
    def full(self, now: Now, shifted: bool) -> Tensor:
        """bool [B, 1]: whether the step of a row recomputes every slot."""

    @abstractmethod
    def active(self, view: View) -> Tensor:
        """bool [B, S]: the slots of a pass, right for the rows in which it is not full."""

    def first_passes(self, shifted: bool) -> int:
        """Full passes before stored keys and values are relied on; slots taken over from an earlier call are
        left out of these."""
        return 1

    def check(self, shifted: bool) -> None:  # noqa: B027, most policies go with every model
        """Raise ValueError where the policy does not go with the model."""
