"""The first stage of a step: which slots are computed, scored and filled."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dkv.core.blocks import Blocks
from dkv.core.density import Density
from dkv.core.schedule import Now, Step
from dkv.core.sequences import Sequences, mask_of, outside, slots_of
from dkv.engine.commit import bounds_of_rows, confident_slots, first_slots
from dkv.engine.config import DiffusionConfig
from dkv.engine.editing import Editing
from dkv.engine.noise import Noise
from dkv.engine.rules import sureness
from dkv.engine.stages import Choice, Packed, StepPlan
from dkv.engine.watch import Importance, Turning
from dkv.kernels.choose.temperature import shares
from dkv.kernels.commit.reference import ENTROPY_RULES, Chosen
from dkv.kernels.plan.op import PLAN
from dkv.policies.base import View


class Planner:
    """Plans the steps of a generation.

    Args:
        config: settings, checked; their policy names the slots to compute.
        rows: the state, whose timetable is set.
        plans: by row, its schedule.
        noise: of random orders.
        shifted: the output of a slot predicts the next one (Dream).
        watch: what the policy observes of the last pass.
        blocks: where the rows of a block-causal model stand; None: every slot sees all.
        editing: of filled slots; None: these stay.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        rows: Sequences,
        plans: Sequence[Sequence[Step]],
        noise: Noise,
        shifted: bool,
        watch: Importance | Turning | None,
        blocks: Blocks | None = None,
        editing: Editing | None = None,
    ):
        self.config, self.rows, self.noise, self.shifted, self.watch = config, rows, noise, shifted, watch
        self.blocks, self.editing = blocks, editing
        self.policy = policy = config.cache
        self.ordered, self.dynamic = config.is_ordered, config.is_dynamic
        self._by_chance = rows.timetable.by_chance
        # The most slots that a step fills, where the schedule tells: a region that slides may make up for lost ones.
        counts = [step.count for plan in plans for step in plan]
        tells = not (self.dynamic or self._by_chance or config.region)
        self.most = max(counts, default=0) if tells else None
        # A policy that plans needs the order of a whole block, which is drawn once.
        per_block = config.confidence == "random" and self.policy.plans and not self._by_chance
        self._order = self._block_orders(plans) if per_block else None
        self._rules = sureness(config)
        # The confidence of every slot when it was last computed, and its entropy: what a policy that plans or observes
        # goes by.
        self._remembers = policy.observes == "mass" or (policy.plans and not self.ordered)
        wide, device = (len(rows.masked), rows.size + 1), rows.tokens.device  # The last column is a spare.
        self._remembered = torch.full(wide, -torch.inf, device=device)
        self._entropies = torch.full_like(self._remembered, torch.inf) if self._rules.rule in ENTROPY_RULES else None
        # How much is known around a slot, for the policy, and to rank slots by.
        self.near, self.certainty = (
            Density(s, rows) if s and rows.size else None for s in (policy.sigma, config.certainty)
        )
        # Slots whose keys and values were taken over from an earlier generation.
        self.spared: Tensor | None = None
        # Whether a plan may ask the device how many slots chance or confidence fill; else it takes any number for them.
        self.waits = True

    def plan(self, cut: Tensor, invalid: Tensor) -> StepPlan:
        """What the next step does; `cut` [B] and `invalid` [B] go into the report of it."""
        rows, policy = self.rows, self.policy
        now, chosen = rows.timetable.now(), None
        view = self._view(now)
        hidden = policy.hidden(view) if self.blocks is None else self.blocks.hidden(now, rows.lengths)
        seen = None if hidden is None else outside(hidden, rows.size)
        bound = bounds_of_rows(self.config, rows, now, seen)
        if self.blocks is not None and self.blocks.rule.seeded and not self.shifted:
            # A seed is predicted by a slot that is not its own.
            chosen = rows.open(now)
        if self.editing is not None:
            chosen = self.editing.scored(now)
        if self.ordered or policy.plans:
            planned, chosen = self._planned(now, bound)
            view = replace(view, planned=planned)
        active, everything = policy.active(view), self._everything(now)
        if self.blocks is not None:
            # A pass that is full computes the current block, and what is not stored before it.
            everything = self.blocks.open(now, rows.masked, self.shifted)
            active = active & everything
        elif seen is not None:
            active, everything = active & seen, (rows.everywhere if everything is None else everything) & seen
        kind = (
            "chosen"
            if self.ordered or (chosen is not None and not policy.plans)
            else "window"
            if policy.plans
            else "masks"
            if self._remembers
            else "open"
        )
        state = (now.numbers, rows.masked, rows.rank, rows.lengths.squeeze(1), active, chosen)
        how = (kind, self.dynamic, self._by_chance, self.shifted)
        *plan, report = PLAN(*state, everything, cut, invalid, *how)
        if self.editing is not None:
            plan[2] = rows.open(now)
        if now.least is not None and (self.dynamic or self.editing is not None):
            plan[3] = now.least.squeeze(1)
        if hidden is not None:
            visible = rows.lengths - hidden.diff(dim=1)
            report = torch.cat((report, visible.T))
        return StepPlan(*plan, report, hidden, bound)

    def _view(self, now: Now) -> View:
        rows = self.rows
        remembered = self._remembered[:, :-1] if self._remembers else None
        density = None if self.near is None else self.near(rows.masked)
        told = None if self.watch is None else self.watch.told
        return View(rows, now, None, self.shifted, remembered, told, density)

    def remember(self, packed: Packed, choice: Choice) -> None:
        """Keep how sure the choice was of the scored slots."""
        if self._remembers:
            for kept, values in ((self._remembered, choice.confidence), (self._entropies, choice.entropy)):
                if kept is not None:
                    kept.view(-1).scatter_(0, self._of_all(packed), values.to(kept.dtype))

    def ranked(self, choice: Choice, packed: Packed) -> Chosen:
        """A choice for the scored slots, and what these are ranked by."""
        confidence = self.certain(choice.confidence, packed)
        score = self.score(confidence, self.rows.timetable.now(), packed)
        return Chosen(choice.token, confidence, score, choice.entropy)

    def certain(self, confidence: Tensor, packed: Packed | None = None) -> Tensor:
        """Log-confidences, multiplied by how much is known around their slots (`certainty`; d2Cache): of the scored
        slots [R] in `packed`, or of all [B, S]."""
        if self.certainty is None:
            return confidence
        density = self.certainty(self.rows.masked).log()
        return (confidence + self._at(density, packed)).to(confidence.dtype)

    def score(self, confidence: Tensor, now: Now, packed: Packed | None = None) -> Tensor:
        """What slots are ranked by: their confidence, or a draw that favours confident ones.

        With a `selection_temperature` T slots are drawn without replacement with weights
        exp(confidence / T), confidence being a probability, a margin or a negative entropy: what
        Dream's `alg_temp` is meant to do (its published code raises).

        Args:
            confidence: [R] of the scored slots in `packed`, or [B, S].
        """
        heat = self.config.selection_temperature
        if heat == 0:
            return confidence
        noise = self._at(self.noise.selection(now.index), packed)
        plain = confidence if self.config.confidence == "entropy" else confidence.exp()
        own, noisy = shares(heat, plain.dtype)
        score = plain * own + noise * noisy
        return score.masked_fill(confidence == -torch.inf, -torch.inf) if self.config.confidence_eos_eot_inf else score

    def _at(self, x: Tensor, packed: Packed | None) -> Tensor:
        """Values [B, S] of the scored slots, [R]; as they are without `packed`."""
        return x if packed is None else torch.nn.functional.pad(x, (0, 1)).view(-1).gather(0, self._of_all(packed))

    def _of_all(self, packed: Packed) -> Tensor:
        """int64 [R]: the scored slots among all [B, S + 1]."""
        return packed.scored_rows * (self.rows.size + 1) + packed.slots

    def _everything(self, now: Now) -> Tensor | None:
        """bool [B, S]: what a full step computes; None: all that a row has."""
        if self.spared is None:
            return None
        first = now.index < self.policy.first_passes(self.shifted)
        return self.rows.everywhere & ~(self.spared & first)

    def _planned(self, now: Now, bound: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The slots that are known to be filled before the pass, in their order, if it matters, and as a mask."""
        open_ = self.rows.open(now)
        count = open_.sum(1, keepdim=True) - now.left
        if self.dynamic:
            count = count.clamp(min=1)
        if self.ordered:
            score = self._ordered(now)
            if self._by_chance:
                drawn = open_ & (score < now.chance)
                planned = slots_of(drawn, self._width(drawn.sum(1)), self.rows.size) if self.policy.plans else None
                return planned, drawn
        else:
            remembered = self.certain(self._remembered[:, :-1])
            score = self.score(remembered, now)
            if self.dynamic:
                entropies = self._entropies if self._entropies is None else self._entropies[:, :-1]
                open_, count = confident_slots(score, remembered, entropies, open_, count, self._rules, bound)
        planned = first_slots(score, open_, count, self._width(count.squeeze(1)))
        return planned, mask_of(planned, open_)

    def _ordered(self, now: Now) -> Tensor:
        """What slots are ranked by where that is known before the pass, [B, S] or [1, S]."""
        if self.config.confidence == "sequential":
            return -self.rows.rank.float()
        return self.noise.order(now.index) if self._order is None else self._order

    def _width(self, counts: Tensor) -> int:
        """At least as many as the slots that any row fills now or has just filled."""
        if self.most is not None:
            return self.most
        return int(torch.maximum(counts, self.rows.fresh.sum(1)).max()) if self.waits else self.rows.size

    def _block_orders(self, plans: Sequence[Sequence[Step]]) -> Tensor:
        """Uniform numbers [B, S], those of every block drawn for its first step."""
        rows, device = self.rows, self.rows.tokens.device
        order = torch.zeros(rows.masked.shape, device=device)
        starts = [[step for step in plan if step.in_block == 0] for plan in plans]
        for block in range(max(map(len, starts), default=0)):
            here = [own[min(block, len(own) - 1)] if own else Step(0, 0, 0, 0, 0, 0, 0) for own in starts]
            index, start, stop = torch.tensor([(s.index, s.start, s.stop) for s in here], device=device).split(1, 1)
            inside = (rows.rank >= start) & (rows.rank < stop)
            order = torch.where(inside, self.noise.order(index), order)
        return order
