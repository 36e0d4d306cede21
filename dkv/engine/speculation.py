"""Drafts that the model writes as a block, and verifies itself as a causal model (Nemotron, `linear_spec`)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences, column
from dkv.core.varlen import PADDINGS, Padding
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import among
from dkv.engine.output import Stats
from dkv.engine.rules import sureness
from dkv.engine.sampler import Sampler
from dkv.engine.settings import DEFAULTS
from dkv.engine.stages import Packed, Shape, StepPlan
from dkv.models.spec import ModelSpec
from dkv.policies import NoCache

# What asks for more than the text that the causal model would write, or for what no round has.
REFUSED = (
    *("temperature", "cfg_scale", "selection_temperature", "factor", "entropy_bound", "near_threshold", "steps"),
    *("edit_threshold", "output_active", "output_confidences", "output_logits", "confidence_eos_eot_inf"),
)


def check(spec: ModelSpec, config: DiffusionConfig) -> None:
    """Raise ValueError where a setting does not go with drafts that are verified."""
    if config.schedule != "speculative":
        return
    if spec.attention != "prefix_causal":
        raise ValueError(
            'schedule="speculative" needs a model that can be read causally, such as Nemotron-Labs-Diffusion: its '
            f"attention is {spec.attention!r}"
        )
    if names := [name for name in REFUSED if getattr(config, name) != DEFAULTS[name]]:
        raise ValueError(
            f'{names[0]} does not go with schedule="speculative", which gives what the model would write token by token'
        )
    if not isinstance(config.cache, NoCache):
        raise ValueError(f'cache {config.cache.name!r} does not go with schedule="speculative"')


class Speculation:
    """A generation whose text is the one that the model, read causally, would write token by token.

    In every round the slots behind the last token are filled as a block, by as many passes as it takes, and one causal
    pass says how many of these drafts it would have written, and the token after them. That pass also stores the keys
    and values of what is taken; those of the others are written anew in the next round.

    The host reads one small tensor a round. Where confidences decide how many drafts a pass fills, it also reads how
    many are left.

    Args:
        model, config, mask_id, pad_id: as for `dkv.engine.engine.Engine`.
        rows: the sequences; each has a block of slots more than it shows.
        budgets: new tokens, by row.
        eos: ids that end a row.

    Attributes:
        numbers: of the rows that are not finished.
        at: int64 [B, 1], by row, the slot of its last token.

    Raises:
        ValueError: a row has no prompt, so that nothing predicts its first token.
    """

    eager_reason = 'schedule="speculative" reads back how many drafts are taken'

    def __init__(
        self,
        model: Any,
        rows: Sequences,
        config: DiffusionConfig,
        mask_id: int,
        pad_id: int,
        budgets: Sequence[int],
        eos: Sequence[int],
        hooks: Sequence[Callable[..., None]] = (),
    ):
        self.hooks, device = hooks, rows.tokens.device
        self.model, self.rows, self.config, self.mask_id, self.pad_id = model, rows, config, mask_id, pad_id
        self.length, self._bound = model.spec.block_length, sureness(config).bound
        self.cache = KVCache(len(rows.tokens), max(rows.size, 1), True, config.kv_cache_dtype)
        self.workspace = kernels.Workspace()
        self.sampler = Sampler(model, config, mask_id, self.workspace)
        self.eos = torch.tensor(list(eos), dtype=torch.int64, device=device)
        self._padding, self._slot = PADDINGS.get(device.type, Padding(1)), torch.arange(rows.size, device=device)
        self.numbers = [row for row, budget in enumerate(budgets) if budget]
        self._prompts = [whole - new for whole, new in zip(rows.row_lengths, rows.to_fill, strict=True)]
        if any(self._prompts[row] == 0 for row in self.numbers):
            raise ValueError('schedule="speculative" continues prompts, and a row of input_ids has no token')
        self._first = column(self._prompts, device)
        # The slot after the last that a row may have.
        self._stop = self._first + column(list(budgets), device)
        self._alive = self._stop > self._first
        self.at, self._invalid = self._first - 1, torch.zeros((), dtype=torch.bool, device=device)
        self._begun, self._new = False, 0
        self.cache.reserve(max((self._prompts[row] for row in self.numbers), default=0))
        self.stats, self._start = Stats(eager_reason=self.eager_reason), time.perf_counter()

    def step(self) -> None:
        """Take a round with every row that is not finished; the first one reads the prompts."""
        if self._begun:
            block, counts = self._block(), self._unfinished([self.length] * len(self._prompts))
            self._draft(block)
            self._verify(block, block, counts, counts)
        else:
            prompt = self._alive & (self._slot <= self.at)
            last = self._unfinished([1] * len(self._prompts))
            self._verify(prompt, prompt & (self._slot == self.at), self._unfinished(self._prompts), last)
            self._begun = True
        self._read_report()
        for hook in self.hooks:
            hook(self, None)

    def _draft(self, block: Tensor) -> None:
        """Fill the slots behind the last tokens: those that are sure enough, and the surest, in every pass."""
        rows, left = self.rows, self._unfinished([self.length - 1] * len(self._prompts))
        while any(left):
            open_ = block & rows.masked
            counts = [self.length * (count > 0) for count in left]
            token, sure = self._pass(block & open_.any(1, keepdim=True), open_, counts, left, causal=False)
            best = self._slot == sure.argmax(1, keepdim=True)
            taken = open_ & (best | (sure >= self._bound))
            rows.tokens[:, :-1].copy_(torch.where(taken, token, rows.tokens[:, :-1]))
            rows.masked &= ~taken
            left = self._left(block & rows.masked, left)

    def _left(self, open_: Tensor, before: list[int]) -> list[int]:
        """How many drafts are open after a pass, by row."""
        if self.config.threshold == 0:
            return [0] * len(before)
        if self.config.threshold is None or max(before) == 1:
            return [max(count - 1, 0) for count in before]
        return open_.sum(1).tolist()

    def _verify(self, active: Tensor, scored: Tensor, counts: list[int], scored_counts: list[int]) -> None:
        """Take the drafts that the causal model would have written, and its next token."""
        rows = self.rows
        token, _ = self._pass(active, scored, counts, scored_counts, causal=True)
        # The output of a slot is what stands in the next one; -1, which no slot holds, where there is none.
        written = token.roll(1, 1)
        same = (self._slot <= self.at) | (rows.tokens[:, :-1] == written)
        self.at.copy_(torch.where(self._alive, same.cumprod(1).sum(1, keepdim=True), self.at))
        here = self._alive & (self._slot == self.at)
        # What was not taken is open again.
        open_ = self._alive & (rows.rank >= 0) & (self._slot > self.at)
        tokens = torch.where(here, written, rows.tokens[:, :-1].masked_fill(open_, self.mask_id))
        rows.tokens[:, :-1].copy_(tokens)
        rows.masked.copy_(open_)

    def _block(self) -> Tensor:
        """bool [B, S]: the slots of the last token and of the drafts behind it."""
        return self._alive & (self._slot >= self.at) & (self._slot < self.at + self.length)

    def _unfinished(self, counts: list[int]) -> list[int]:
        """The counts of the rows that are not finished; 0 of the others."""
        return [count * (row in self.numbers) for row, count in enumerate(counts)]

    def _pass(
        self, active: Tensor, scored: Tensor, counts: list[int], scored_counts: list[int], causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute slots, bool [B, S], so many of each row; of those that are scored a token and its log-confidence,
        [B, S], -1 and -inf elsewhere."""
        rows, report = self.rows, torch.stack((active.sum(1), scored.sum(1)))
        total, scored_total = (self._padding.filled(sum(n), rows.masked.numel()) for n in (counts, scored_counts))
        shape = Shape(total, max(counts), scored_total, max(scored_counts))
        packed = Packed.of(rows, StepPlan(active, scored, None, report[1], report), shape, shifted=False)
        ends = packed.positions + 1
        if not causal:
            ends = (self.at + self.length).squeeze(1).index_select(0, packed.rows)
        hidden = self.model.step(
            packed.tokens,
            self.cache.places(packed.positions),
            self.cache,
            rows=packed.rows,
            segments=packed.active,
            ends=ends,
            outputs=packed.places,
            output_segments=packed.scored,
            workspace=self.workspace,
        )
        self.stats.add_pass(sum(counts), sum(rows.row_lengths[row] for row in self.numbers))
        places = packed.scored_rows * (rows.size + 1) + packed.slots
        found = []
        for x, none in zip(self.sampler(hidden, None, list, list)[:2], (-1, -torch.inf), strict=True):
            wide = x.new_full((len(counts), rows.size + 1), none)
            found.append(wide.view(-1).scatter_(0, places, x).view_as(wide)[:, :-1])
        self._invalid |= found[1].isnan().any()
        return found[0], found[1]

    def _read_report(self) -> None:
        """End rows at their first end token, or where they have what was asked for; read which, once."""
        rows = self.rows
        ends = among(rows.tokens[:, :-1], self.eos) & (rows.rank >= 0) & (self._slot <= self.at)
        behind = torch.where(ends, self._slot + 1, rows.size + 1).amin(1, keepdim=True)
        self._stop.copy_(torch.minimum(self._stop, behind))
        done = self.at + 1 >= self._stop
        rows.cut(torch.where(done, self._stop, rows.size + 1), self.pad_id)
        self._alive &= ~done
        new = torch.minimum(self.at + 1, self._stop) - self._first
        new, done, invalid = torch.stack((new, done, self._invalid.expand_as(new))).squeeze(2).tolist()
        if any(invalid):
            raise ValueError(self.sampler.suspects())
        self._new, self.numbers = sum(new), [row for row in self.numbers if not done[row]]
        ends = (self._prompts[row] + new[row] - 1 + self.length for row in self.numbers)
        self.cache.reserve(max(ends, default=0))

    @property
    def sequences(self) -> Tensor:
        """int64 [B, L] in the caller's layout, as they are now."""
        return self.rows.in_layout()

    def finish(self) -> KVCache:
        """The keys and values, with the text that they belong to; after the last round."""
        self.cache.tokens, self.cache.seen = self.rows.tokens[:, :-1].clone(), self._slot < self.at.minimum(self._stop)
        return self.cache

    def snapshot(self, **facts: Any) -> Stats:
        """What the generation has cost so far; `facts` are further fields."""
        return replace(self.stats, new_tokens=self._new, seconds=time.perf_counter() - self._start, **facts)
