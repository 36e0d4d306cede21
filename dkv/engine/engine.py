"""One generation, step by step: plan -> forward -> choose -> commit, and then the next plan."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.core.blocks import Blocks
from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences
from dkv.core.varlen import GRAPHED, PADDINGS, Padding
from dkv.engine.config import DiffusionConfig
from dkv.engine.editing import Editing
from dkv.engine.ending import Ending
from dkv.engine.graphs import runner_of
from dkv.engine.guidance import guided, in_both_branches
from dkv.engine.in_blocks import block_rule, plans_of
from dkv.engine.narrow import Narrowing, NarrowPass
from dkv.engine.noise import Noise
from dkv.engine.observe import Observer
from dkv.engine.output import Stats
from dkv.engine.plan import Planner
from dkv.engine.reuse import take_over
from dkv.engine.rules import sureness
from dkv.engine.sampler import Sampler
from dkv.engine.stages import Choice, Forward, Packed, Shape, Status, StepPlan, StepResult
from dkv.engine.watch import watch_of
from dkv.kernels.commit.op import ADVANCE
from dkv.kernels.commit.reference import ENTROPY_RULES, Chosen, Pass, State
from dkv.parallel import ranks_of

# Called after every step.
OnStep = Callable[["Engine", StepResult], None]


class Engine:
    """The state of one generation. Nothing is kept on the model, so several may run at once.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        rows: the sequences. A finished one stays where it is, and no more of it is computed.
        config: settings, checked.
        noise: the random numbers.
        mask_id: id of a slot without a token.
        pad_id: what a row is filled up with beyond its end.
        processor: changes logits, as `LogitsProcessor` of transformers.
        ending: where rows end early; None: nowhere.
        past: keys and values of an earlier generation, whose common prefixes are taken over.
        cache: where keys and values are kept, that of others, too; None: made here.
        graphs: whether its steps may be replayed.
        hooks: called with the engine and every `StepResult`: the seam for records, traces and measurements.

    Attributes:
        numbers: of the rows that are not finished.
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
        cache: KVCache | None = None,
        graphs: bool = True,
    ):
        self.model, self.rows, self.config, self.mask_id, self.pad_id = model, rows, config, mask_id, pad_id
        self.shifted, self.ending, self.hooks, self.ranks = model.spec.shifted, ending, hooks, ranks_of(model)
        self.branches, batch, device = 2 if config.cfg_scale else 1, len(rows.tokens), rows.tokens.device
        rule = block_rule(model.spec, config)
        self.blocks = rule and Blocks(rule, rows.masked)
        plans = plans_of(config, rows, rule, self.shifted)
        # The timetable may keep it: with the engine in it, both would wait for the collector of cycles.
        rows.begin(plans, partial(config.cache.full, shifted=self.shifted), config.region)
        self.watch = watch_of(config.cache, rows, model.spec.num_layers)
        self.editing = None if config.edit_threshold is None else Editing(config, rows, ending and ending.eos)
        self.planner = Planner(config, rows, plans, noise, self.shifted, self.watch, self.blocks, self.editing)
        cuts = config.cache.cuts(model.spec.num_layers)
        self.narrowing = Narrowing(config.cache, model, rows, self.branches, mask_id) if cuts else None
        slots, grows = max(rows.size, 1), rule is not None
        self.noise = noise
        self.cache = cache or KVCache(batch * self.branches, slots, grows, config.kv_cache_dtype)
        self.workspace = kernels.Workspace()
        self.rules = sureness(config)
        self.sampler = Sampler(
            model, config, mask_id, self.workspace, processor, entropy=self.rules.rule in ENTROPY_RULES
        )
        self.numbers = list(range(batch)) if any(rows.to_fill) else []
        # Slots whose keys and values were computed when their token was known.
        self.seen = torch.zeros_like(rows.masked)
        self.cut = torch.zeros(batch, dtype=torch.int64, device=device)
        self.invalid = torch.zeros(batch, dtype=torch.bool, device=device)
        self.next_plan: StepPlan | None = None
        self.stats, self._start = Stats(), time.perf_counter()
        if past is not None:
            self.stats.reused_slots = take_over(self, past)
        self.runner = runner_of(self, past is None and cache is None) if graphs else None
        self.planner.waits = self.runner is None
        self.padding = GRAPHED if self.runner else PADDINGS.get(device.type, Padding(1))
        if self.numbers:
            self.prepare()

    def step(self) -> None:
        """Take a step with every row that is not finished."""
        shape = self.shape()
        self._count()
        result = self.advance(shape) if self.runner is None else self.runner.advance(shape)
        for hook in self.hooks:
            hook(self, result)
        self.read_status()

    def shape(self) -> Shape:
        """The shape of the next step, its entries filled up."""
        now, before, left = self.status, self.status.active, []
        for counts in now.left:
            left.append(None if counts == before else self.filled(counts))
            before = counts
        # Which of the scored slots are left is found in the pass; in a shifted model slot 0 predicts two.
        scored = [min(of, most + self.shifted) for of, most in zip(now.scored, before, strict=True)]
        return Shape(*self.filled(now.active), *self.filled(scored), tuple(left))

    def filled(self, counts: list[int]) -> tuple[int, int]:
        """All entries of a pass, and the most of a row, filled up."""
        rows = self.rows
        # A graph serves texts of other lengths, too.
        most = rows.masked.numel() if self.runner else sum(rows.row_lengths)
        total = self.padding.filled(sum(counts), most)
        return total, min(total, self.padding.filled(max(counts), rows.size))

    def advance(self, shape: Shape) -> StepResult:
        """A whole step in a shape that holds all its entries, and the plan of the next one.

        All that changes is written in place, and nothing is read from the device or uploaded to it: this is what a
        graph captures.
        """
        plan = self.next_plan
        forward = self._forward(plan, shape) if shape.active else None
        choice = self._choose(forward) if forward is not None and shape.scored else None
        self.commit(plan if forward is None else forward.plan, forward, choice)
        self._plan_next()
        return StepResult(plan, forward, choice)

    def _plan_next(self) -> None:
        """Plan the next step; where steps are replayed, in the tensors of the last plan."""
        plan = self.planner.plan(self.cut, self.invalid)
        if self.narrowing is not None:
            plan = self.narrowing.planned(plan)
        if self.runner is None or self.next_plan is None:
            self.next_plan = plan
        else:
            self.next_plan.copy_(plan)

    def prepare(self) -> None:
        """Plan the next step from the state as it is."""
        self._plan_next()
        self.read_status()

    def read_status(self) -> None:
        """Read what the host has to know of the next step, once."""
        self.status = status = Status.after(self.next_plan)
        if any(status.invalid):
            raise ValueError(self.sampler.suspects())
        self.note_rows()

    def note_rows(self) -> None:
        """See which rows are finished, and what the others reach in the next step."""
        status = self.status
        self.numbers = [row for row, left in enumerate(status.masked) if left]
        self.cache.reserve(max((status.visible[row] for row in self.numbers if status.visible), default=0))

    def _forward(self, plan: StepPlan, shape: Shape) -> Forward:
        """Send the active slots through the model, for the hidden states that predict the scored ones."""
        packed, config = Packed.of(self.rows, plan, shape, self.shifted), self.config
        ranges, gaps = self.rows.key_ranges, plan.hidden
        given, narrow = packed, self.narrowing and NarrowPass(self.narrowing, plan, packed, shape)
        ends = None
        if self.blocks is not None:  # What is hidden lies behind the ends.
            ends, gaps = self.blocks.ends(packed.positions, packed.rows, self.rows.timetable.now()), None
        if self.branches == 2:
            given = in_both_branches(packed, self.rows, self.mask_id)
            ranges, gaps = (None if x is None else x.repeat(2, 1) for x in (ranges, gaps))
        observer = None if self.watch is None else Observer(packed, self.rows, self.cache, self.workspace, self.ranks)
        hidden = self.model.step(
            given.tokens,
            self.cache.places(given.positions),
            self.cache,
            rows=given.rows,
            segments=given.active,
            key_ranges=ranges,
            key_gaps=gaps,
            ends=ends,
            outputs=None if config.output_logits else given.places,
            output_segments=given.scored,
            observe=observer,
            narrow=narrow,
            workspace=self.workspace,
        )
        if observer is not None:
            self.watch.update(observer)
        if self.branches == 2:
            hidden = guided(hidden, config.cfg_scale)
        if narrow is not None:
            packed, plan = narrow.packed, narrow.plan
        return Forward(packed, plan, hidden, config.output_logits, narrow)

    @property
    def is_full(self) -> bool:
        """Whether the next pass sends every slot that is not hidden through all layers."""
        through, visible = [self.status.active, *self.status.left][-1], self.status.visible or self.rows.row_lengths
        return all(through[row] == visible[row] for row in self.numbers)

    def _count(self) -> None:
        """Count the next pass, if it computes anything."""
        lengths, counts = self.rows.row_lengths, [sum(count) for count in (self.status.active, *self.status.left)]
        if counts[0]:
            skipped = 0 if self.narrowing is None else self.narrowing.skipped(counts)
            total = sum(lengths[row] for row in self.numbers)
            self.stats.add_pass(*(self.branches * n for n in (counts[0], total)), self.is_full, self.branches * skipped)

    def _choose(self, forward: Forward) -> Choice:
        """A token for each of the scored slots."""
        packed, hidden = forward.packed, forward.hidden
        if forward.every:
            hidden = hidden.index_select(0, packed.places)
        keys = None
        if self.config.temperature > 0:
            keys = self.noise.token_keys(packed.slots, packed.scored_rows, self.rows.timetable.now().index)
        return Choice(*self.sampler(hidden, keys, packed.scored.lengths.tolist, self.rows.texts))

    def commit(self, plan: StepPlan, forward: Forward | None, choice: Choice | None) -> None:
        """Write the tokens of the most confident eligible slots, go on in the schedule, and cut rows at their ends."""
        rows, table = self.rows, self.rows.timetable
        if self.blocks is not None:
            self.blocks.passed(table.now(), plan.active)
        starts, chosen = self._chosen(plan, forward, choice)
        before = None if self.editing is None else self.editing.before()
        asked = (ending := self.ending) is not None and ending.asked
        state = State(
            *(rows.tokens, rows.masked, rows.fresh, self.seen, rows.rank),
            *(table.at, table.current, self.cut, self.invalid),
        )
        passed = Pass(plan.active, plan.scored, plan.eligible, plan.count, starts, plan.bound)
        ends = None if ending is None or asked or before is not None else ending.eos
        ADVANCE(state, table.table, passed, chosen, self.rules._replace(ends=ends, pad=self.pad_id))
        if before is not None:
            beyond = self.editing.after(before, plan, choice, forward.packed, self.pad_id)
            self.seen &= ~beyond
            self.cut += beyond.sum(1)
        if asked:
            # Criteria are Python: asked of rows that go on. They may look at the clock: those of a first process count.
            ends = ending.ends(rows, self.numbers)
            ends = ends if self.ranks is None else self.ranks.first(ends)
            beyond = rows.cut(ends, self.pad_id)
            self.seen &= ~beyond
            self.cut.copy_(torch.where(ends.squeeze(1) > rows.size, self.cut, beyond.sum(1)))
        table.follow(rows.masked, rows.rank)

    def _chosen(self, plan: StepPlan, forward: Forward | None, choice: Choice | None) -> tuple[Tensor, Chosen]:
        """Where the scored slots of each row begin, int64 [B], and what was chosen for them; it is remembered, too."""
        if choice is None:
            starts = torch.zeros_like(plan.count)
            none = torch.empty(0, device=starts.device)
            return starts, Chosen(starts[:0], none, none, none if self.rules.rule in ENTROPY_RULES else None)
        self.planner.remember(forward.packed, choice)
        if self.narrowing is not None:
            self.narrowing.remember(forward.packed, choice.confidence)
        return forward.packed.scored.starts, self.planner.ranked(choice, forward.packed)

    @property
    def sequences(self) -> Tensor:
        """int64 [B, L] in the caller's layout, as they are now."""
        return self.rows.in_layout()

    def finish(self) -> KVCache:
        """The keys and values, with the text that they belong to; after the last step."""
        self.cache.tokens, self.cache.seen = self.rows.tokens[:, :-1].clone(), self.seen.clone()
        if self.blocks is not None:
            self.blocks.keep(self.cache)
        return self.cache

    def snapshot(self, **facts: Any) -> Stats:
        """What the generation has cost so far; `facts` are further fields."""
        rows, filled = self.rows, 0
        if any(rows.to_fill):
            counts = zip(rows.to_fill, self.status.masked, self.status.cut, rows.shown, strict=True)
            # What ends a last block is filled with it, and not shown.
            filled = sum(min(whole - masked - cut, shown) for whole, masked, cut, shown in counts)
        if self.blocks is not None and not self.numbers:
            self.stats.merged_stores = self.blocks.merged_stores()
        return replace(self.stats, new_tokens=filled, seconds=time.perf_counter() - self._start, **facts)
