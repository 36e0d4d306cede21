"""Drafts that the model writes as a block, and verifies itself as a causal model (Nemotron, `linear_spec`)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences
from dkv.core.varlen import Segments
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import among
from dkv.engine.output import Stats
from dkv.engine.rules import sureness
from dkv.engine.sampler import Sampler
from dkv.engine.settings import DEFAULTS
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

    Args:
        model, config, mask_id, pad_id: as for `dkv.engine.engine.Engine`.
        rows: the sequences; each has a block of slots more than it shows.
        budgets: new tokens, by row.
        eos: ids that end a row.

    Attributes:
        numbers: of the rows that are not finished.
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
        self.hooks = hooks
        self.model, self.rows, self.config, self.mask_id, self.pad_id = model, rows, config, mask_id, pad_id
        self.length, self._bound = model.spec.block_length, sureness(config).bound
        self.cache, self.workspace = KVCache(len(rows.tokens), max(rows.size, 1), grows=True), kernels.Workspace()
        self.sampler = Sampler(model, config, mask_id, self.workspace)
        self.eos, device = torch.tensor(list(eos), dtype=torch.int64, device=rows.tokens.device), rows.tokens.device
        self._first = (rows.rank < 0).cumprod(1).sum(1)  # [B], slots before the first one to fill
        self._last = self._first + torch.tensor(list(budgets), device=device)
        # By row, the slot of its last token; -1: the prompt is not computed yet.
        self.at = torch.full_like(self._first, -1)
        self.stats, self._start = Stats(eager_reason=self.eager_reason), time.perf_counter()
        self.numbers = [row for row, budget in enumerate(budgets) if budget]

    def step(self) -> None:
        """Take a round with every row that is not finished."""
        last = self.at.tolist()
        if min(last) < 0:
            self._prefill()
        else:
            self.cache.reserve(max(last) + 1 + self.length)
            self._draft()
            self._verify()
        self._finish_rows()
        for hook in self.hooks:
            hook(self, None)

    def _prefill(self) -> None:
        self.cache.reserve(int(self._first.max()))
        starts = torch.zeros_like(self._first)
        token, _ = self._pass(starts, self._first, causal=True, last_only=True)
        self.at.copy_(self._first)
        self._write(self.at[:, None], token[:, None])

    def _draft(self) -> None:
        """Fill the slots behind the last tokens: those that are sure enough, and the surest, in every pass."""
        slots = self._block()
        while bool((open_ := self.rows.masked.gather(1, slots)).any()):
            token, sure = self._pass(self.at, self._counts(), causal=False)
            sure = sure.masked_fill(~open_, -torch.inf)
            best = torch.zeros_like(open_).scatter_(1, sure.argmax(1, keepdim=True), True)
            self._write(slots, token, open_ & (best | (sure >= self._bound)))

    def _verify(self) -> None:
        """Take the drafts that the causal model would have written, and its next token."""
        slots = self._block()
        token, _ = self._pass(self.at, self._counts(), causal=True)
        drafts = self.rows.tokens.gather(1, slots)
        taken = (drafts[:, 1:] == token[:, :-1]).cumprod(1).sum(1) + 1
        taken *= self._unfinished()
        behind = torch.arange(1, self.length + 1, device=slots.device)
        self._write(slots + 1, token, behind <= taken[:, None])
        self.at += taken
        # What was not taken is open again.
        open_ = (self.rows.rank >= 0) & (torch.arange(self.rows.size, device=slots.device) > self.at[:, None])
        self.rows.tokens[:, :-1].masked_fill_(open_, self.mask_id)
        self.rows.masked.copy_(open_)

    def _block(self) -> Tensor:
        """int64 [B, block]: the slots of the last token and of the drafts behind it."""
        return self.at[:, None] + torch.arange(self.length, device=self.at.device)

    def _unfinished(self) -> Tensor:
        found = torch.zeros_like(self.at)
        found[self.numbers] = 1
        return found

    def _counts(self) -> Tensor:
        return self._unfinished() * self.length

    def _pass(self, starts: Tensor, counts: Tensor, causal: bool, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Compute so many slots of every row from `starts` on; a token and its log-confidence for each [B, most], or
        for the last one [B]."""
        most, device = int(counts.max()), counts.device
        inside = torch.arange(most, device=device) < counts[:, None]
        slots = (starts[:, None] + torch.arange(most, device=device)).clamp(max=self.rows.size)
        row = torch.arange(len(counts), device=device)[:, None].expand_as(slots)[inside]
        positions, begin = slots[inside], counts.cumsum(0) - counts
        ends = positions + 1 if causal else (starts + counts).index_select(0, row)
        outputs = segments = None
        if last_only:
            outputs, segments = begin + counts - 1, Segments(row.new_tensor(range(len(counts))), counts.clamp(max=1), 1)
        hidden = self.model.step(
            self.rows.tokens[row, positions],
            positions,
            self.cache,
            rows=row,
            segments=Segments(begin, counts, most),
            ends=ends,
            outputs=outputs,
            output_segments=segments,
            workspace=self.workspace,
        )
        token, sure = self.sampler(hidden, None, list, list)[:2]
        self.stats.add_pass(int(counts.sum()), sum(self.rows.row_lengths[row] for row in self.numbers))
        if last_only:
            return token, sure
        wide = [x.new_zeros(inside.shape).masked_scatter_(inside, x) for x in (token, sure)]
        return wide[0], wide[1]

    def _write(self, slots: Tensor, token: Tensor, where: Tensor | None = None) -> None:
        """Write tokens [B, n] at slots [B, n], where it holds."""
        spare = self.rows.size
        slots = slots if where is None else torch.where(where, slots, spare)
        self.rows.tokens.scatter_(1, slots, torch.where(slots == spare, self.rows.tokens[:, spare:], token))
        wide = torch.nn.functional.pad(self.rows.masked, (0, 1))
        self.rows.masked.copy_(wide.scatter_(1, slots, False)[:, :-1])

    def _finish_rows(self) -> None:
        """End rows at their first end token, or where they have what was asked for."""
        rows, slot = self.rows, torch.arange(self.rows.size, device=self.at.device)
        written = (rows.rank >= 0) & (slot <= self.at[:, None])
        ends = among(rows.tokens[:, :-1], self.eos) & written
        behind = torch.where(ends, slot + 1, rows.size + 1).amin(1)
        done = (behind <= rows.size) | (self.at + 1 >= self._last)
        cut = torch.where(done, torch.minimum(behind, self._last), rows.size + 1)
        rows.cut(cut[:, None], self.pad_id)
        self.numbers = [row for row in self.numbers if not bool(done[row])]

    @property
    def sequences(self) -> Tensor:
        """int64 [B, L] in the caller's layout, as they are now."""
        return self.rows.in_layout()

    def finish(self) -> KVCache:
        """The keys and values, with the text that they belong to; after the last round."""
        stored = torch.arange(self.rows.size, device=self.at.device) < self.at[:, None]
        self.cache.tokens, self.cache.seen = self.rows.tokens[:, :-1].clone(), stored
        return self.cache

    def snapshot(self, **facts: Any) -> Stats:
        """What the generation has cost so far; `facts` are further fields."""
        filled = int((torch.minimum(self.at + 1, self._last) - self._first).clamp(min=0).sum())
        return replace(self.stats, new_tokens=filled, seconds=time.perf_counter() - self._start, **facts)
