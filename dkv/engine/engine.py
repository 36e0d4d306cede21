"""One generation, step by step: plan -> forward -> choose -> commit, and then the next plan."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences, slots_of
from dkv.core.varlen import Padding, Varlen
from dkv.engine.commit import confident_counts
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending
from dkv.engine.graphs import runner_of
from dkv.engine.guidance import guided, twice, with_and_without_text
from dkv.engine.noise import Noise
from dkv.engine.output import Stats
from dkv.engine.plan import Planner
from dkv.engine.reuse import take_over
from dkv.engine.sampler import Sampler
from dkv.engine.stages import Choice, Forward, Shape, Status, StepPlan, StepResult

# By the kind of device, where steps are taken as they come. oneDNN compiles a product anew for a shape that it has not
# met, and every step would have another one.
PADDINGS = {"cpu": Padding(4)}
# Where steps are replayed: each shape is a graph. Few entries cost a GPU about what one costs.
GRAPHED = Padding(64, (16, 32, 64, 96, 128, 192, 256), alike=True)


# Called after every step.
OnStep = Callable[["Engine", StepResult], None]


class Engine:
    """The state of one generation. Nothing is kept on the model, so several may run at once.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        rows: the sequences, which leave one by one as they are finished.
        config: settings, checked.
        noise: the random numbers.
        mask_id: id of a slot without a token.
        pad_id: what a row is filled up with beyond its end.
        processor: changes logits, as `LogitsProcessor` of transformers.
        ending: where rows end early; None: nowhere.
        past: keys and values of an earlier generation, whose common prefixes are taken over.
        hooks: called with the engine and every `StepResult`: the seam for records, traces and measurements.

    Attributes:
        numbers: of the rows that are not finished, in the order in which they stand, their place in the batch.
        sequences: int64 [B, L] in the caller's layout; of unfinished rows as of `update()`.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequences,
        config: DiffusionConfig,
        noise: Noise,
        mask_id: int,
        pad_id: int = 0,
        processor: Any = None,
        ending: Ending | None = None,
        past: KVCache | None = None,
        hooks: Sequence["OnStep"] = (),
    ):
        self.model, self.rows, self.config, self.mask_id, self.pad_id = model, rows, config, mask_id, pad_id
        self.shifted, self.ending, self.hooks = model.spec.shifted, ending, hooks
        self.branches, batch = 2 if config.cfg_scale else 1, len(rows.tokens)
        plans = [config.plan(self.shifted, row, count) for row, count in enumerate(rows.to_fill)]
        rows.begin(plans)
        self.planner = Planner(config, rows, plans, noise, self.shifted)
        self.noise, self.cache = noise, KVCache(batch * self.branches, max(rows.size, 1))
        self.workspace = kernels.Workspace()
        self.sampler = Sampler(model, config, mask_id, self.workspace, processor)
        device = rows.tokens.device
        self.numbers, self.sequences = list(range(batch)) if rows.size else [], rows.in_layout()
        # Slots whose keys and values were computed when their token was known.
        self.seen = torch.zeros_like(rows.masked)
        self._final = (rows.tokens[:, :-1].clone(), torch.zeros_like(rows.masked))
        self._invalid = torch.zeros((), dtype=torch.bool, device=device)
        self._cut = torch.zeros(batch, dtype=torch.int64, device=device)
        self.next_plan: StepPlan | None = None
        self.stats, self._start = Stats(), time.perf_counter()
        self._wanted, self._given_up = sum(rows.to_fill), 0
        if past is not None:
            self.stats.reused_slots = take_over(self, past)
        self.runner = runner_of(self)
        self.padding = GRAPHED if self.runner else PADDINGS.get(device.type, Padding(1))
        if self.numbers:
            self.prepare()

    def step(self) -> None:
        """Take a step with every row that is not finished."""
        shape = self.shape()
        self._count(self.status.active)
        result = self.advance(shape) if self.runner is None else self.runner.advance(shape)
        for hook in self.hooks:
            hook(self, result)
        self.read_status()

    def shape(self) -> Shape:
        """The shape of the next step, its entries filled up."""
        most, status = self.rows.size, self.status
        return Shape(self.padding.filled(status.active, most), self.padding.filled(status.scored, most))

    def advance(self, shape: Shape) -> StepResult:
        """A whole step in a shape that holds all its entries, and the plan of the next one.

        All that changes is written in place, and in a shape of rows that are alike nothing is read from the device
        or uploaded to it: this is what a graph captures.
        """
        plan = self.next_plan
        forward = self._forward(plan, shape) if any(shape.active) else None
        choice = self._choose(plan, forward) if forward is not None and forward.scored.total else None
        self._commit(plan, choice)
        self._plan_next()
        return StepResult(plan, forward, choice)

    def _plan_next(self) -> None:
        """Plan the next step, and gather what the host has to know of it."""
        plan, rows = self.planner.plan(), self.rows
        if self.runner is None or self.next_plan is None:
            self.next_plan = plan
        else:
            self.next_plan.copy_(plan)
        invalid = self._invalid.expand(len(rows.tokens))
        self.report = torch.stack((plan.active.sum(1), plan.scored.sum(1), rows.masked.sum(1), self._cut, invalid))

    def prepare(self) -> None:
        """Plan the next step from the state as it is."""
        self._plan_next()
        self.read_status()

    def read_status(self) -> None:
        """Read what the host has to know of the next step, once, and let finished rows go."""
        *counts, invalid = self.report.tolist()
        if any(invalid):
            raise ValueError(self._suspects())
        self.status = Status(*counts)
        if 0 in self.status.masked:
            self._leave()

    def _suspects(self) -> str:
        """What to say of logits that are no numbers."""
        config = self.config
        suspects = ["the weights, and the dtype (float16 overflows where bfloat16 and float32 do not)"]
        if self.sampler.processor is not None:
            suspects.insert(0, "the logits_processor, which changes them")
        if config.cfg_scale:
            suspects.insert(0, f"cfg_scale={config.cfg_scale}, which multiplies them")
        return f"the model's logits hold NaN or infinity, or no id that may be chosen: check {', then '.join(suspects)}"

    def _forward(self, plan: StepPlan, shape: Shape) -> Forward:
        """Send the active slots through the model, for the hidden states that predict the scored ones."""
        rows, size, config = self.rows, self.rows.size, self.config
        active, scored = self._layout(shape.active, plan.active), self._layout(shape.scored, plan.scored)
        positions, slots = slots_of(plan.active, active.width, size), slots_of(plan.scored, scored.width, size)
        source = torch.minimum((slots - int(self.shifted)).clamp(min=0), rows.lengths - 1)
        place = (plan.active.cumsum(1) - 1).gather(1, source).clamp_(min=0)
        every = config.output_logits
        inputs = (rows.tokens.gather(1, positions), positions, rows.key_ranges, None if every else place)
        layouts = (active, None if every else scored)
        if self.branches == 2:
            tokens = with_and_without_text(inputs[0], positions, rows, self.mask_id)
            inputs = (tokens, *map(twice, inputs[1:]))
            layouts = tuple(layout and layout.twice() for layout in layouts)
        tokens, passed, key_ranges, places = inputs
        hidden = self.model.step(
            tokens,
            passed,
            self.cache,
            key_ranges=key_ranges,
            rows=places,
            varlen=layouts[0],
            varlen_rows=layouts[1],
            workspace=self.workspace,
        )
        if self.branches == 2:
            hidden = guided(hidden, config.cfg_scale)
        self.seen |= plan.active & ~rows.masked
        counts, full = self.status.active, self.status.active == rows.row_lengths
        return Forward(positions, counts, full, slots, scored, hidden, place, every)

    def _layout(self, entries: Sequence[int], slots: Tensor) -> Varlen:
        """The layout of so many entries a row, of which those count that stand for `slots` (bool [B, S])."""
        return Varlen(entries, slots.device, slots.sum(1) if self.padding.alike else None)

    def _count(self, active: list[int]) -> None:
        """Count a pass that computes so many slots of every row, if it computes any."""
        stats, lengths = self.stats, self.rows.row_lengths
        if any(active):
            stats.passes += 1
            stats.full_passes += active == lengths
            stats.computed_slots += self.branches * sum(active)
            stats.total_slots += self.branches * sum(lengths)

    def _choose(self, plan: StepPlan, forward: Forward) -> Choice:
        """A token for each of the scored slots."""
        hidden, slots, layout = forward.hidden, forward.slots, forward.scored
        if forward.every:
            hidden = hidden.gather(1, forward.place[..., None].expand(-1, -1, hidden.shape[-1]))
        keys = None
        if self.config.temperature > 0:
            keys = layout.packed(self.noise.token_keys(slots, plan.now.index))
        found = self.sampler(layout.packed(hidden), keys, layout.counts, self.rows.texts)
        token, confidence = (layout.padded(x) for x in found)
        self._invalid |= confidence.isnan().any()
        return Choice(slots, token, confidence)

    def _commit(self, plan: StepPlan, choice: Choice | None) -> None:
        """Write the tokens of the most confident eligible slots, go on in the schedule, and cut rows at their ends."""
        rows = self.rows
        if choice is None:
            nowhere = torch.full_like(rows.lengths, rows.size)
            rows.commit(plan.now, plan.open, nowhere, torch.zeros_like(nowhere, dtype=torch.bool))
        else:
            slots, confidence = choice.slots, choice.confidence
            allowed, count = slots < rows.size, plan.count.squeeze(1)
            if plan.eligible is not plan.scored:
                allowed &= plan.eligible.gather(1, slots.clamp(max=rows.size - 1))
            if self.config.is_dynamic:
                count = confident_counts(confidence, allowed, count, self.config)
            committed = kernels.commit_(
                rows.tokens,
                choice.token,
                self.planner.score(confidence, plan.now, slots),
                allowed,
                count,
                positions=slots,
                validate=False,
            )
            rows.commit(plan.now, plan.open, slots, committed)
            self.planner.remember(slots, confidence)
        if self.ending is not None:
            beyond = rows.cut(self.ending.ends(rows, self.numbers), self.pad_id)
            self.seen &= ~beyond
            self._cut += beyond.sum(1)

    def update(self) -> Tensor:
        """Bring `sequences` up to date and return them."""
        self.sequences[self.numbers] = self.rows.in_layout()
        return self.sequences

    def _leave(self) -> None:
        """Take finished rows off the state and out of the cache."""
        masked = self.status.masked
        finished = [row for row, left in enumerate(masked) if left == 0]
        others = [row for row, left in enumerate(masked) if left]
        self.update()
        numbers = [self.numbers[row] for row in finished]
        tokens, seen = self._final
        tokens[numbers], seen[numbers] = self.rows.tokens[finished, :-1], self.seen[finished]
        self._given_up += sum(self.status.cut[row] for row in finished)
        if self.runner is not None:
            self.runner.forget()
        if not others:
            self.numbers = []
            return
        # Rows that need not change places stay, as their keys and values would have to be moved.
        later = [row for row in others if row >= len(others)]
        order = [row if row in others else later.pop() for row in range(len(others))]
        self.cache.keep([row * self.branches + i for row in order for i in range(self.branches)])
        self.rows.keep(order)
        self.planner.keep(order)
        self.seen, self._cut = self.seen[order], self._cut[order]
        self.next_plan, self.status = self.next_plan.keep(order), self.status.keep(order)
        self.numbers = [self.numbers[row] for row in order]

    def finish(self) -> KVCache:
        """The keys and values, with the text that they belong to; after the last step."""
        self.cache.tokens, self.cache.seen = self._final
        return self.cache

    def snapshot(self, **facts: Any) -> Stats:
        """What the generation has cost so far; `facts` are further fields."""
        unfilled = sum(self.status.masked) + sum(self.status.cut) if self.numbers else 0
        filled = self._wanted - self._given_up - unfilled
        return replace(self.stats, new_tokens=filled, seconds=time.perf_counter() - self._start, **facts)
