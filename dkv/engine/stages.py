"""What passes from one stage of a step to the next. Nothing writes back into an earlier one."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.varlen import Varlen


@dataclass(frozen=True)
class StepPlan:
    """What a step is about to do. Slots are bool [B, S].

    Attributes:
        now: the step of every row.
        open: the masked slots of its block.
        active: slots to compute.
        full: bool [B, 1], the rows in which these are all.
        scored: slots whose logits matter.
        eligible: slots that may be filled.
        count: int64 [B, 1], how many of them are; with a threshold or a factor, the least.
    """

    now: Now
    open: Tensor
    active: Tensor
    full: Tensor
    scored: Tensor
    eligible: Tensor
    count: Tensor

    def copy_(self, other: "StepPlan") -> None:
        """Take over a plan of the same settings for as many rows, in place."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            # Under some policies the eligible slots are the scored ones, the very tensor.
            if field.name != "eligible" or self.eligible is not self.scored:
                mine.copy_(theirs)

    def keep(self, rows: Tensor) -> "StepPlan":
        """The plan of these rows, in this order."""
        kept = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        if self.eligible is self.scored:
            kept["eligible"] = kept["scored"]
        return replace(self, **kept)


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

    def keep(self, rows: Sequence[int]) -> "Status":
        """The status of these rows, in this order."""
        return Status(*([getattr(self, field.name)[row] for row in rows] for field in fields(self)))


@dataclass(frozen=True)
class Shape:
    """How large a pass is: all that the host decides about it. By row, filled up.

    Attributes:
        active, scored: entries that go through the model, and that a token is chosen for.
    """

    active: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True)
class Forward:
    """What went through the model in a step.

    Attributes:
        positions: int64 [B, N], the slots computed, ascending, filled up with S; `counts` of a row count.
        full: these are all.
        slots: int64 [B, R], the slots that are scored, filled up with S, in the layout `scored`.
        hidden: [B, R, d], of what predicts these slots; or [B, N, d] if `every`, and `place` [B, R] says where.
    """

    positions: Tensor
    counts: list[int]
    full: bool
    slots: Tensor
    scored: Varlen
    hidden: Tensor
    place: Tensor
    every: bool


@dataclass(frozen=True)
class Choice:
    """Token (int64) and log-confidence of the scored slots, all [B, R]; slots filled up with S."""

    slots: Tensor
    token: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class StepResult:
    """A step that was taken, before rows that it finished leave. `forward` and `choice` are None where there was
    nothing to compute, or nothing to choose.
    """

    plan: StepPlan
    forward: Forward | None
    choice: Choice | None
