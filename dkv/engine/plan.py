"""The first stage of a step: which slots are computed, scored and filled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dkv.core.schedule import Now, Step
from dkv.core.sequences import Sequences, mask_of, slots_of
from dkv.engine.commit import confident_counts, first_slots
from dkv.engine.config import DiffusionConfig
from dkv.engine.noise import Noise
from dkv.engine.stages import StepPlan
from dkv.kernels.choose.temperature import shares
from dkv.policies.base import View


class Planner:
    """Plans the steps of a generation.

    Args:
        config: settings, checked; their policy names the slots to compute.
        rows: the state, whose timetable is set.
        plans: by row, its schedule.
        noise: of random orders.
        shifted: the output of a slot predicts the next one (Dream).
    """

    def __init__(
        self,
        config: DiffusionConfig,
        rows: Sequences,
        plans: Sequence[Sequence[Step]],
        noise: Noise,
        shifted: bool,
    ):
        self.config, self.policy, self.rows, self.noise, self.shifted = config, config.cache, rows, noise, shifted
        self.random, self.dynamic = config.confidence == "random", config.is_dynamic
        self._by_chance = rows.timetable.by_chance
        # The most slots that a step fills, where the schedule tells.
        counts = [step.count for plan in plans for step in plan]
        self._most = None if self.dynamic or self._by_chance else max(counts, default=0)
        # A policy that plans needs the order of a whole block, which is drawn once.
        per_block = self.random and self.policy.plans and not self._by_chance
        self._order = self._block_orders(plans) if per_block else None
        # The confidence of every slot when it was last computed: what a policy that plans goes by.
        wide = (len(rows.masked), rows.size + 1)  # The last column is a spare.
        self._remembered = torch.full(wide, -torch.inf, device=rows.tokens.device)
        # Slots whose keys and values were taken over from an earlier generation.
        self.spared: Tensor | None = None

    @property
    def reads(self) -> bool:
        """Whether a plan reads from the device how many slots there are: only chance and confidence make it ask."""
        return self.policy.plans and self._most is None

    def plan(self) -> StepPlan:
        rows = self.rows
        now = rows.timetable.now()
        open_ = rows.open(now)
        count = open_.sum(1, keepdim=True) - now.left
        if self.dynamic:
            count = count.clamp(min=1)
        planned, chosen = self._planned(now, open_, count)
        full = self.policy.full(now, self.shifted)
        view = View(rows, now, planned, self.shifted)
        active = torch.where(full, self._everything(now), self.policy.active(view))
        if self.random:
            scored = eligible = chosen
        else:
            # A slot is predicted by its own output, or in a shifted model by that of the slot before it.
            reached = torch.cat((active[:, :1], active[:, :-1]), 1) if self.shifted else active
            # A policy that plans scores its window, too: the next plan is made of these confidences.
            scored = open_ & reached if self.policy.plans else open_ & (count > 0)
            eligible = torch.where(full, open_, chosen) if self.policy.plans else scored
        if self._by_chance:
            count = torch.full_like(count, rows.size)
        return StepPlan(now, open_, active, full, scored, eligible, count)

    def remember(self, slots: Tensor, confidence: Tensor) -> None:
        """Keep the confidences [B, R] of `slots` [B, R], which may be filled up with S."""
        if self.policy.plans and not self.random:
            self._remembered.scatter_(1, slots, confidence.to(self._remembered.dtype))

    def score(self, confidence: Tensor, now: Now, slots: Tensor | None = None) -> Tensor:
        """What slots are ranked by: their confidence, or a draw that favours confident ones.

        With a `selection_temperature` T slots are drawn without replacement with weights
        exp(confidence / T), confidence being a probability, a margin or a negative entropy: what
        Dream's `alg_temp` is meant to do (its published code raises).
        """
        heat = self.config.selection_temperature
        if heat == 0:
            return confidence
        noise = self.noise.selection(now.index)
        if slots is not None:
            noise = noise.gather(1, slots.clamp(max=noise.shape[1] - 1))
        plain = confidence if self.config.confidence == "entropy" else confidence.exp()
        own, noisy = shares(heat, plain.dtype)
        score = plain * own + noise * noisy
        return score.masked_fill(confidence == -torch.inf, -torch.inf) if self.config.confidence_eos_eot_inf else score

    def keep(self, order: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self.noise.keep(order)
        self._remembered = self._remembered[order]
        self._order = None if self._order is None else self._order[order]
        self.spared = None if self.spared is None else self.spared[order]

    def _everything(self, now: Now) -> Tensor:
        if self.spared is None:
            return self.rows.everywhere
        first = now.index < self.policy.first_passes(self.shifted)
        return self.rows.everywhere & ~(self.spared & first)

    def _planned(self, now: Now, open_: Tensor, count: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The slots that are known to be filled before the pass, in their order and as a mask; None: none are."""
        if not self.random and not self.policy.plans:
            return None, None
        if self.random:
            score = self.noise.order(now.index) if self._order is None else self._order
            if self._by_chance:
                drawn = open_ & (score < now.chance)
                planned = slots_of(drawn, self._width(drawn.sum(1)), self.rows.size) if self.policy.plans else None
                return planned, drawn
        else:
            remembered = self._remembered[:, :-1]
            score = self.score(remembered, now)
            if self.dynamic:
                count = confident_counts(remembered, open_, count.squeeze(1), self.config)[:, None]
        planned = first_slots(score, open_, count, self._width(count.squeeze(1)))
        return planned, mask_of(planned, open_)

    def _width(self, counts: Tensor) -> int:
        """At least as many as the slots that any row fills now or has just filled."""
        if self._most is not None:
            return self._most
        return int(torch.maximum(counts, self.rows.fresh.sum(1)).max())

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
