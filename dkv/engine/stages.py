"""What passes from one stage of a step to the next. Nothing writes back into an earlier one."""

from dataclasses import dataclass, fields

from torch import Tensor

from dkv.core.varlen import Segments


@dataclass(frozen=True)
class StepPlan:
    """What a step is about to do.

    Attributes:
        active: bool [B, S], slots to compute.
        scored: bool [B, S], slots whose logits matter.
        eligible: bool [B, S], slots that may be filled; None: the scored ones.
        count: int64 [B], how many of them are; with a threshold or a factor, the least.
        report: int64 [5, B], what the host reads: the fields of `Status`, and whether any logits were no numbers.
    """

    active: Tensor
    scored: Tensor
    eligible: Tensor | None
    count: Tensor
    report: Tensor

    def copy_(self, other: "StepPlan") -> None:
        """Take over a plan of the same settings, in place."""
        for field in fields(self):
            mine = getattr(self, field.name)
            if mine is not None:
                mine.copy_(getattr(other, field.name))


@dataclass(frozen=True)
class Status:
    """What the host knows of the rows between two steps: one tensor, read once a step.

    Attributes:
        active, scored: slots of the next pass, by row.
        masked, cut: slots without a token, and those that became padding beyond an early end, by row.
    """

    active: list[int]
    scored: list[int]
    masked: list[int]
    cut: list[int]


@dataclass(frozen=True)
class Shape:
    """How large a pass is: all that the host decides about it.

    Attributes:
        active, scored: entries that go through the model, and that a token is chosen for, filled up.
        most_active, most_scored: what no row has more of.
    """

    active: int
    most_active: int
    scored: int
    most_scored: int


@dataclass(frozen=True)
class Packed:
    """The entries of a pass, T of them, and those that a token is chosen for, R. Both are filled up at the end.

    Attributes:
        tokens: int64 [T], ids at the active slots.
        positions: int64 [T], these slots, which are also rotary positions; S where filled up.
        rows: int64 [T], their rows.
        slots, scored_rows: int64 [R], the scored slots, S where filled up, and their rows.
        places: int64 [R], the entry that predicts each of them.
        active, scored: where the entries of each row stand.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    slots: Tensor
    scored_rows: Tensor
    places: Tensor
    active: Segments
    scored: Segments


@dataclass(frozen=True)
class Forward:
    """What went through the model in a step.

    Attributes:
        packed: the entries.
        hidden: [R, d], of what predicts the scored slots, or [T, d] if `every`.
    """

    packed: Packed
    hidden: Tensor
    every: bool


@dataclass(frozen=True)
class Choice:
    """Token (int64) and log-confidence of the scored slots, [R] each."""

    token: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class StepResult:
    """A step that was taken. `forward` is None where nothing was computed, `choice` where nothing was chosen."""

    plan: StepPlan
    forward: Forward | None
    choice: Choice | None
