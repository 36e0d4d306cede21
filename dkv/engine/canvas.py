"""Decoding of DiffusionGemma: canvases of random tokens, denoised as a whole, one behind the other.

A canvas has no masks. In every step each slot gets a token that is drawn and one that is best; the surest of those
drawn stand on the next canvas, all others become random again. What a step thinks is an input of the next one. The
result is the canvas of best tokens. What stands before a canvas is encoded once, exactly.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dkv.core.kv_cache import KVCache
from dkv.engine.canvas_settings import CanvasSettings, settings_of
from dkv.engine.denoise import Numbers, Thought, accepted, numbers, think
from dkv.engine.inputs import check_helpers, checked_ids, checked_mask, taken_apart
from dkv.engine.noise import text_keys
from dkv.engine.output import DiffusionOutput, Stats
from dkv.engine.reuse import shared_prefixes
from dkv.engine.run import Steps, drawn_seeds
from dkv.models.gemma import Gemma
from dkv.parallel import facts_of
from dkv.version import versions


@dataclass
class Step:
    """One step, for who wants to look at it: of the rows [R] that it computed, all tensors [R, ...]."""

    canvas: int
    number: int
    rows: Tensor
    before: Tensor
    hidden: Tensor
    thought: Thought
    accepted: Tensor
    after: Tensor
    finished: Tensor


class CanvasRun(Steps):
    """A generation in canvases.

    Args:
        model, settings: of the generation.
        ids, mask: [B, P] prompts, and where they are not padding.
        numbers_of: from the number of a canvas to its random numbers, in place of those from the seeds.
        generator: source of the seeds if the settings have none.
        on_step: gets every `Step`.
        past: keys and values of an earlier generation, of which those of common prefixes are taken over.
    """

    def __init__(
        self,
        model: Gemma,
        ids: Tensor,
        mask: Tensor,
        settings: CanvasSettings,
        generator: torch.Generator | None = None,
        numbers_of: Callable[[int], Numbers] | None = None,
        on_step: Callable[[Step], None] | None = None,
        past: KVCache | None = None,
    ):
        self.model, self.ids, self.settings, self.on_step = model, ids, settings, on_step
        self.slots = model.spec.block_length
        self.canvases = -(-settings.max_new_tokens // self.slots)
        self.lengths = mask.sum(1)
        # Padding is put behind the prompts, where it is written over.
        self.prompts = ids.gather(1, (~mask).to(torch.int8).argsort(dim=1, stable=True))
        longest = int(self.lengths.max()) if ids.numel() else 0
        self.prompts, needed = self.prompts[:, :longest], longest + self.canvases * self.slots
        if needed > model.spec.max_positions:
            raise ValueError(
                f"a prompt of {longest} tokens and {self.canvases} canvases of {self.slots} need {needed} positions, "
                f"the model has {model.spec.max_positions}"
            )
        self.buffer = KVCache(len(ids), max(needed, 1), True, settings.kv_cache_dtype)
        self.buffer.tokens = ids.new_zeros(len(ids), self.buffer.length)
        self.buffer.seen = torch.zeros_like(self.buffer.tokens, dtype=torch.bool)
        self.seed = drawn_seeds(settings.seed, len(ids), generator, model.ranks)
        if model.ranks is not None:
            model.ranks.check_same(**facts_of(model), input_ids=(ids, mask), **settings.to_dict())
        seeds = self.seed if isinstance(self.seed, list) else [self.seed] * len(ids)
        texts = [row[keep] for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        keys, steps = text_keys(texts, seeds).to(ids.device), settings.max_denoising_steps
        known = model.spec.vocab_limit or model.spec.vocab_size
        self.numbers_of = numbers_of or (lambda canvas: numbers(keys, canvas, steps, self.slots, known))
        self.done: list[Tensor] = []
        self.draft: Tensor | None = None
        self.history: list[Tensor] = []
        self.stats = Stats(seed=self.seed, total_slots=0)
        self._began = time.perf_counter()
        self.known = torch.zeros_like(self.lengths)
        if past is not None:
            first = model.spec.layers[0]
            heads = first.num_kv_heads // (model.ranks.size if model.ranks else 1)
            kind = (model.spec.num_layers, heads, first.head_dim, model.dtype)
            self.known = shared_prefixes(past, self.buffer, kind, self.prompts, self.lengths)
            self.stats.reused_slots = int(self.known.sum())
        self._note(self.prompts, torch.zeros_like(self.lengths), self.known)

    @property
    def sequences(self) -> Tensor:
        """As `Steps.sequences`: prompts, canvases that are done, and the best tokens of the one that is denoised."""
        return torch.cat((self.ids, *self.done, *([] if self.draft is None else [self.draft])), 1)

    def steps(self) -> Iterator[bool]:
        ended = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        ends = torch.tensor(self.settings.eos_token_id, dtype=torch.int64, device=self.ids.device)
        starts = self.lengths
        for canvas in range(self.canvases):
            self.buffer.reserve(self.prompts.shape[1] + (canvas + 1) * self.slots)
            if canvas == 0:
                self._encode_prompts()
            else:
                self._encode(self.done[-1], starts - self.slots, torch.full_like(starts, self.slots))
            yield from self._denoise(canvas, starts, (~ended).nonzero().squeeze(1))
            text = self.draft
            is_end = torch.isin(text, ends)
            behind = (is_end.cumsum(1) - is_end.long()) > 0
            text = text.masked_fill(behind | ended[:, None], self.settings.pad_token_id)
            self.stats.new_tokens += int((~(behind | ended[:, None])).sum())
            self.done, self.draft = [*self.done, text], None
            ended, starts = ended | is_end.any(1), starts + self.slots
            if bool(ended.all()):
                break

    def _encode_prompts(self) -> None:
        """Encode what is not known of the prompts, aligned to the left."""
        lengths = self.lengths - self.known
        wanted = torch.arange(int(lengths.max()), device=self.ids.device)
        places = (self.known[:, None] + wanted).clamp_(max=max(self.prompts.shape[1] - 1, 0))
        self._encode(self.prompts.gather(1, places), self.known, lengths)

    def _encode(self, text: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Encode the first `lengths` [B] tokens of `text` [B, N], which stand at slots from `starts` [B] on."""
        if text.shape[1]:
            self.model.encode(text, starts, self.buffer)
            self.stats.computed_slots += text.numel()
            self._note(text, starts, lengths)

    def _note(self, text: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Note in the buffer whose keys and values it has."""
        column = torch.arange(text.shape[1], device=text.device)
        row, at = (column < lengths[:, None]).nonzero(as_tuple=True)
        self.buffer.tokens[row, starts[row] + at] = text[row, at]
        self.buffer.seen[row, starts[row] + at] = True

    def _denoise(self, canvas: int, starts: Tensor, rows: Tensor) -> Iterator[bool]:
        """The steps of one canvas, of `rows` alone; those that are finished keep their best tokens, and rest."""
        s = self.settings
        random = self.numbers_of(canvas)
        x = random.start
        self.draft = torch.full_like(x, s.pad_token_id)
        before = x.new_full((s.stability_threshold, *x.shape), -1)
        soft = None
        for number in range(s.max_denoising_steps):
            left = s.max_denoising_steps - number
            now = x.index_select(0, rows)
            hidden = self.model.decode(now, rows, starts, self.buffer, soft)
            temperature = s.t_min + (s.t_max - s.t_min) * (left / s.max_denoising_steps)
            thought = think(self.model, hidden, temperature, random.uniform[number].index_select(0, rows))
            drawn = thought.drawn if random.drawn is None else random.drawn[number].index_select(0, rows)
            taken = accepted(thought.entropy, s.entropy_bound)
            after = torch.where(taken, drawn, random.renewed[number].index_select(0, rows))
            stable = (before.index_select(1, rows) == thought.best).all(-1).all(0)
            finished = stable & (thought.entropy.mean(-1) < s.confidence_threshold)
            x = x.index_copy(0, rows, after)
            # Drafts that were handed out stay as they are.
            self.draft = self.draft.index_copy(0, rows, thought.best)
            before = torch.cat((before, self.draft[None]))[1:]
            self._count(len(rows))
            if self.on_step is not None:
                self.on_step(Step(canvas, number, rows, now, hidden, thought, taken, after, finished))
            yield True
            keep = [place for place, done in enumerate(finished.tolist()) if not done]
            if not keep:
                break
            soft = thought.soft
            if len(keep) < len(rows):
                keep = torch.tensor(keep, device=rows.device)
                rows, soft = rows.index_select(0, keep), soft.index_select(0, keep)

    def _count(self, rows: int) -> None:
        self.stats.passes += 1
        self.stats.computed_slots += rows * self.slots
        # Without a cache every pass computes what stands before the canvas, too.
        self.stats.total_slots += rows * (self.prompts.shape[1] + (len(self.done) + 1) * self.slots)
        if self.settings.output_history:
            self.history.append(self.sequences)

    def state(self) -> DiffusionOutput:
        facts = {**versions(), "dtype": str(self.model.dtype), "device": str(self.model.device)}
        self.stats.seconds = time.perf_counter() - self._began
        self.stats.settings = {**self.settings.to_dict(), **facts}
        return DiffusionOutput(sequences=self.sequences, stats=replace(self.stats))

    def output(self) -> DiffusionOutput:
        """As `Steps.output`; in the history, canvases that were not reached are padding."""
        output = self.state()
        output.kv_cache = self.buffer
        if self.settings.output_history:
            width, pad = output.sequences.shape[1], self.settings.pad_token_id
            wide = [torch.nn.functional.pad(text, (0, width - text.shape[1]), value=pad) for text in self.history]
            output.history = torch.stack(wide)
        return output


def checked_run(
    model: Gemma,
    input_ids: Tensor | Mapping,
    attention_mask: Tensor | None,
    given: Any,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    generator: torch.Generator | None = None,
    streamer: Any = None,
    past: KVCache | None = None,
) -> CanvasRun:
    """The run that the arguments of `dkv.generate` ask for; raises as that does."""
    input_ids, attention_mask = taken_apart(input_ids, attention_mask)
    ids, mask = checked_ids(model, input_ids), checked_mask(input_ids, attention_mask)
    settings = settings_of(model.spec, given, overrides, ids.shape[1])
    if isinstance(settings.seed, list) and len(settings.seed) != len(ids):
        raise ValueError(f"seed is a list of {len(settings.seed)}, but input_ids has {len(ids)} rows")
    check_helpers(settings, generator, streamer)
    return CanvasRun(model, ids, mask, settings, generator, past=past)
