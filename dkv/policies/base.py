"""What a cache policy sees and answers. It is index logic: it sees the state of the rows, never the model.

All keys and values live in one `dkv.core.KVCache` indexed by position. A slot that a policy does not name keeps the
key and value of the last pass that computed it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

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
        confidence: float [B, S], log-confidence of every mask when a token was last chosen for it; -inf before. None
            where no policy goes by it.
        observed: what the last pass told, see `Policy.observes`; None: nothing.
        density: float64 [B, S], how much is known around a slot (`dkv.core.density`); None where `Policy.sigma` is.
    """

    rows: Sequences
    now: Now
    planned: Tensor | None
    shifted: bool
    confidence: Tensor | None = None
    observed: Tensor | None = None
    density: Tensor | None = None

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


@dataclass(frozen=True)
class Cut:
    """Fewer slots go on after this layer: no more than this share of those that entered the pass."""

    layer: int
    share: float


class Policy(ABC):
    """Base of all policies.

    Attributes:
        name: as which `DiffusionConfig(cache=...)` and the command line know it.
        plans: the slots of a cached step must be chosen before the pass.
        slides: True: it goes with the sliding schedule alone; False: with any other; None: with all.
        observes: what a pass tells beside its logits: "mass", how much of all attention slots get, float64 [B, S], and
            then all masks that it reaches are scored; "turn", whether attention has turned, bool [B, 1]; None: nothing.
        sigma: of the density that the policy goes by, in slots; None: by none.
        in_blocks: it goes with a block-causal model, where a full pass is one over the current block.
        by_confidence: its passes fill the surest of the slots that they compute, which need not be those that
            confidence="random" draws.
    """

    name: ClassVar[str]
    plans: ClassVar[bool] = False
    slides: bool | None = None
    observes: ClassVar[str | None] = None
    sigma: ClassVar[float | None] = None
    in_blocks: ClassVar[bool] = False
    by_confidence: ClassVar[bool] = False

    def _take(self, check: Callable[..., Any], name: str, low: float, *high: float, optional: bool = False) -> None:
        """Check an argument by its range, and keep it as a plain number; with `optional` it may be None."""
        value = getattr(self, name)
        if value is not None or not optional:
            object.__setattr__(self, name, check(name, value, low, *high))

    @abstractmethod
    def full(self, now: Now, shifted: bool) -> Tensor:
        """bool [B, 1]: whether the step of a row recomputes every slot that is not hidden."""

    @abstractmethod
    def active(self, view: View) -> Tensor:
        """bool [B, S]: the slots of a pass, right for the rows in which it is not full. Hidden ones are left out."""

    def hidden(self, view: View) -> Tensor | None:
        """int64 [B, 2]: of every row a gap, its first slot and the one after its last, that the pass neither computes
        nor sees; equal numbers: none. `view.planned` is not known yet. None: no row has a gap in any step."""
        return None

    def cuts(self, layers: int) -> list[Cut]:
        """Where slots stop inside a network of so many layers. What such a policy has beside is told by `SkipCache`."""
        return []

    def first_passes(self, shifted: bool) -> int:
        """Full passes before stored keys and values are relied on; slots taken over from an earlier call are
        left out of these."""
        return 1

    def check(self, shifted: bool) -> None:  # noqa: B027, most policies go with every model
        """Raise ValueError where the policy does not go with the model."""
