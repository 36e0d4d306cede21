"""What passes from one stage of a step to the next. Nothing writes back into an earlier one."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dkv.core.varlen import Segments
from dkv.kernels.plan.op import PACK

if TYPE_CHECKING:
    from dkv.core.sequences import Sequences
    from dkv.engine.narrow import NarrowPass


@dataclass(frozen=True)
class StepPlan:
    """What a step is about to do.

    Attributes:
        active: bool [B, S], slots to compute.
        scored: bool [B, S], slots whose logits matter.
        eligible: bool [B, S], slots that may be filled; None: the scored ones.
        count: int64 [B], how many of them are; with a rule of confidence, the least.
        report: int64 [5 or more, B], what the host reads: the fields of `Status`, in their order; `visible` only where
            something is hidden.
        hidden: int64 [B, 2], of every row a gap of slots that are neither computed nor seen; None: no row has one.
        bound: float32 [B], how sure a slot of a row must be to be filled, in the scale of
            `dkv.engine.rules.sureness`; None: as sure in all rows and steps.
        left: int64 [cuts, B], how many of the active slots go on after each cut of the policy; None: it has none.
    """

    active: Tensor
    scored: Tensor
    eligible: Tensor | None
    count: Tensor
    report: Tensor
    hidden: Tensor | None = None
    bound: Tensor | None = None
    left: Tensor | None = None

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
        invalid: 1 in every row in which any logits were no numbers, else 0.
        visible: slots that the next pass may compute and see, by row; None: all that a row has.
        left: slots that go on after each cut of the policy, by cut and row.
        first: the first slot without a token, by row, of a row that has one; None: nobody asks.
    """

    active: list[int]
    scored: list[int]
    masked: list[int]
    cut: list[int]
    invalid: list[int]
    visible: list[int] | None = None
    left: Sequence[list[int]] = ()
    first: list[int] | None = None

    @classmethod
    def after(cls, plan: StepPlan, first: Tensor | None = None) -> "Status":
        """Read the report of a plan, and with it the `first` [B] slots without a token, if they are asked for."""
        report = plan.report if first is None else torch.cat((plan.report, first[None]))
        lines = report.tolist()
        firsts = None if first is None else lines.pop()
        more = 5 if plan.hidden is None else 6
        return cls(*lines[:5], lines[5] if more > 5 else None, lines[more:], firsts)


@dataclass(frozen=True)
class Shape:
    """How large a pass is: all that the host decides about it.

    Attributes:
        active, scored: entries that go through the model, and that a token is chosen for, filled up.
        most_active, most_scored: what no row has more of.
        left: by cut of the policy, the entries that go on, filled up, and what no row has more of; None where all do.
    """

    active: int
    most_active: int
    scored: int
    most_scored: int
    left: tuple[tuple[int, int] | None, ...] = ()


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

    @classmethod
    def of(cls, rows: "Sequences", plan: StepPlan, shape: Shape, shifted: bool) -> "Packed":
        """The active slots of all rows one after the other, and where the scored ones stand among them."""
        slots = rows.tokens, plan.active, plan.scored, rows.lengths.squeeze(1)
        *entries, starts = PACK(*slots, plan.report, shape.active, shape.scored, shifted)
        active = Segments(starts[0], plan.report[0], shape.most_active)
        return cls(*entries, active, Segments(starts[1], plan.report[1], shape.most_scored))


@dataclass(frozen=True)
class Forward:
    """What went through the model in a step.

    Attributes:
        packed: the entries; with cuts, those that went through all layers.
        plan: what was planned of these.
        hidden: [R, d], of what predicts the scored slots, or [T, d] if `every`.
        narrow: which slots went on after each cut; None: the policy has none.
    """

    packed: Packed
    plan: StepPlan
    hidden: Tensor
    every: bool
    narrow: "NarrowPass | None" = None


@dataclass(frozen=True)
class Choice:
    """Token (int64) and log-confidence of the scored slots, and the entropy in nats if a rule needs it: [R] each."""

    token: Tensor
    confidence: Tensor
    entropy: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """A step that was taken. `forward` is None where nothing was computed, `choice` where nothing was chosen."""

    plan: StepPlan
    forward: Forward | None
    choice: Choice | None
