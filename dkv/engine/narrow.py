"""The slots of a pass that go on after some of its layers, chosen on the device while the pass runs."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dkv.core.sequences import Sequences, mask_of
from dkv.core.varlen import Layout, Segments
from dkv.engine.guidance import in_both_branches
from dkv.engine.stages import Packed, Shape, StepPlan
from dkv.kernels.change.op import KEEP_ROWS, ROW_CHANGE
from dkv.kernels.plan.op import PACK
from dkv.parallel import ranks_of
from dkv.policies.base import View
from dkv.policies.skip import SkipCache


class Narrowing:
    """What a policy with cuts goes by, from pass to pass.

    Args:
        policy: the one that has cuts.
        model: whose layers are cut.
        rows: the state, whose timetable is set.
        branches: 2 with guidance.
        mask_id: id of a slot without a token.

    Attributes:
        cuts: after which layers slots stop, and how many.
        hidden: [cuts, B * branches, S + 1, d], what left the layer of a cut when the slot last went on. The last slot
            is a spare.
        shares: float64 [cuts, 1], of the cuts.
        sure: float32 [B, S + 1], how sure a masked slot was when it was last scored, a probability.
    """

    def __init__(self, policy: SkipCache, model: Any, rows: Sequences, branches: int, mask_id: int):
        self.policy, self.rows, self.branches, self.mask_id = policy, rows, branches, mask_id
        self.shifted, self.layers, self.ranks = model.spec.shifted, model.spec.num_layers, ranks_of(model)
        self.cuts = policy.cuts(self.layers)
        batch, device = len(rows.tokens), rows.tokens.device
        self.shares = torch.tensor([[cut.share] for cut in self.cuts], dtype=torch.float64, device=device)
        size = len(self.cuts), batch * branches, rows.size + 1, model.spec.hidden_size
        self.hidden = torch.zeros(size, dtype=model.dtype, device=device)
        self.sure = torch.zeros(batch, rows.size + 1, device=device)

    def view(self) -> View:
        return View(self.rows, self.rows.timetable.now(), None, self.shifted)

    def planned(self, plan: StepPlan) -> StepPlan:
        """The plan with how many slots go on after each cut; the report tells of them, too."""
        left = self.policy.left(self.view(), plan.report[0], plan.count, self.shares)
        return replace(plan, left=left, report=torch.cat((plan.report, left)))

    def skipped(self, counts: Sequence[int]) -> float:
        """What slots that stopped have spared, in slots: of `counts`, how many entered, and went on after each cut."""
        ends = [*(cut.layer + 1 for cut in self.cuts), self.layers]
        stopped = [counts[0] - count for count in counts[1:]]
        return (
            sum(count * (end - start) for count, (start, end) in zip(stopped, pairwise(ends), strict=True)) / ends[-1]
        )

    def remember(self, packed: Packed, confidence: Tensor) -> None:
        """Keep the log-confidences [R] of the scored slots."""
        self.sure[packed.scored_rows, packed.slots] = confidence.exp().to(self.sure.dtype)


class NarrowPass:
    """One pass, which gets narrower after the layers of the cuts; a `dkv.core.varlen.Narrow`.

    Attributes:
        packed, plan: the entries that are left, and the plan of these; at first all of the pass.
        stages: by cut, the rows and slots that went on, int64 [T'] each; filled up with slot S.
    """

    def __init__(self, narrowing: Narrowing, plan: StepPlan, packed: Packed, shape: Shape):
        self.narrowing, self.plan, self.packed, self.shape = narrowing, plan, packed, shape
        self.layers = [cut.layer for cut in narrowing.cuts]
        self.stages: list[tuple[Tensor, Tensor]] = []
        # By slot, what its score is made of; asked for where the first slots stop.
        self._known: Tensor | None = None

    def __call__(self, layer: int, x: Tensor, delta: Tensor | None, layout: Layout) -> tuple[Tensor, Layout]:
        number, of = self.layers.index(layer), self.narrowing
        kept, size, entries = of.hidden[number], self.shape.left[number], None
        if size is not None:
            # Guidance: the branch with text decides for both.
            own = len(self.packed.positions)
            text = x[:own], None if delta is None else delta[:own]
            change = ROW_CHANGE(*text, kept, self.packed.positions, self.packed.rows)
            if of.ranks is not None:
                # The states are the same to the last bit where the processes have the same machine.
                change = of.ranks.first(change)
            entries = self._narrow(self.plan.left[number], change, *size)
            if of.branches == 2:
                entries = torch.cat((entries, entries + own))
            layout = self.layout(layout.outputs is None)
        self.stages.append((self.packed.rows, self.packed.positions))
        return KEEP_ROWS(x, delta, kept, layout.positions, layout.rows, entries), layout

    def layout(self, every: bool) -> Layout:
        """The entries that are left, in both branches where there are two; with `every` all have an output."""
        given, of = self.packed, self.narrowing
        if of.branches == 2:
            given = in_both_branches(given, of.rows, of.mask_id)
        outputs = (None, None) if every else (given.places, given.scored)
        return Layout(given.positions, given.rows, given.active, *outputs)

    def _narrow(self, count: Tensor, change: Tensor, total: int, most: int) -> Tensor:
        """Let the `count` [B] best entries of every row go on; returns which of those before they are, int64 [total].

        Args:
            change: [T] of their hidden states.
            total, most: of the entries that go on, filled up, and of those of a row.
        """
        of, rows, before = self.narrowing, self.narrowing.rows, self.packed.active
        lane = torch.arange(before.most, device=change.device)
        outside = lane >= before.lengths[:, None]
        entry = (before.starts[:, None] + lane).clamp_(max=len(change) - 1)
        slots = self.packed.positions.take(entry)
        confidence, bonus = self._of_slots().gather(2, slots.expand(2, -1, -1))
        score = of.policy.score(confidence, change.take(entry), bonus, outside)
        order = score.sort(dim=1, descending=True, stable=True).indices
        # As many as go on are there, and come before what is outside.
        going = torch.empty_like(outside).scatter_(1, order, lane < count[:, None])
        computed = mask_of(torch.where(going, slots, rows.size), rows.masked)
        reached = torch.cat((computed[:, :1], computed[:, :-1]), 1) if of.shifted else computed
        scored = self.plan.scored & reached
        self.plan = replace(self.plan, active=computed, scored=scored)
        counts = torch.stack((count, scored.sum(1)))
        how = total, self.shape.scored, of.shifted
        *found, starts = PACK(rows.tokens, computed, scored, rows.lengths.squeeze(1), counts, *how)
        ends = Segments(starts[0], count, most), Segments(starts[1], counts[1], self.shape.most_scored)
        self.packed = Packed(*found, *ends)
        # What fills up is kept as the spare slot, whatever it is.
        return entry.take(going.view(-1).nonzero_static(size=total, fill_value=0).view(-1))

    def _of_slots(self) -> Tensor:
        """Confidence and bonus of every slot, [2, B, S + 1], by the slot that predicts."""
        if self._known is None:
            of, view = self.narrowing, self.narrowing.view()
            open_ = of.rows.open(view.now)
            sure = of.sure[:, :-1] * open_
            if of.shifted:
                sure = _of_sources(sure)
            known = torch.stack((sure, of.policy.bonus(view, open_, self.plan.count)))
            self._known = torch.nn.functional.pad(known, (0, 1))
        return self._known


def _of_sources(x: Tensor) -> Tensor:
    """Values [B, S] of slots, where they are predicted in a shifted model: slot 0 predicts itself, and the next."""
    left = x.roll(-1, 1)
    left[:, -1] = 0
    left[:, 0] = torch.maximum(left[:, 0], x[:, 0])
    return left
