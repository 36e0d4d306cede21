"""A generation from its canvas to its output: rows leave as they end, and what is asked for is recorded."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from dkv.buffer import KVBuffer
from dkv.canvas import Canvas, column
from dkv.choosing import LogitsProcessor
from dkv.config import DiffusionConfig
from dkv.ending import Ending, StoppingCriteria
from dkv.output import DiffusionOutput
from dkv.passes import Pass
from dkv.policies import NoCache
from dkv.policy import sources
from dkv.randomness import Numbers, Randomness
from dkv.records import RECORDS
from dkv.sampler import Sampler
from dkv.version import versions


class Run:
    """One generation, step by step.

    Args:
        model, canvas, config, mask_id: as for `Sampler`.
        generator, numbers, processor, criteria, buffer: as for `dkv.generate`.

    Attributes:
        rows: numbers in the batch of the rows that are not finished, in the order in which they stand on the canvas.
        sequences: int64 [B, L] in the caller's layout; of unfinished rows as of the last time they were asked for.
    """

    def __init__(
        self, model: Any, canvas: Canvas, config: DiffusionConfig, mask_id: int,
        generator: torch.Generator | None = None, numbers: Numbers | None = None,
        processor: LogitsProcessor | list | None = None, criteria: StoppingCriteria | list | None = None,
        buffer: KVBuffer | None = None,
    ):  # fmt: skip
        self.start, self.model, self.config = time.perf_counter(), model, config
        batch = len(canvas.tokens)
        self.seed = _seed(config.seed, batch, generator)
        seeds = self.seed if isinstance(self.seed, list) else [self.seed] * batch
        processor = _listed("logits_processor", processor, LogitsProcessorList)
        criteria = _listed("stopping_criteria", criteria, StoppingCriteriaList)
        if numbers is not None and not callable(numbers):
            raise TypeError(f"numbers must be callable, (step, shape) -> uniform numbers, got {numbers!r}")
        self.sampler = Sampler(model, canvas, config, Randomness(seeds, canvas, numbers), mask_id, processor)
        self.rows, self.sequences = list(range(batch)), canvas.sequences()
        self.tokens, self.seen = canvas.tokens[:, :-1].clone(), torch.zeros_like(canvas.masked)
        self.pad, eos = pad_id(model, config), config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        self.ending = Ending(eos, criteria, batch) if eos or criteria else None
        self.wanted, self.given_up, self.reused = sum(map(len, canvas.to_fill)), 0, 0
        self.kept = {name: [] for name in RECORDS if getattr(config, f"output_{name}")}
        if buffer is not None:
            self.reused = take_over(self.sampler, buffer)
        self._leave()

    def step(self) -> None:
        """Take a step with every row that is not finished."""
        done = self.sampler.run()
        if self.ending is not None:
            self._end()
        for name, records in self.kept.items():
            records.append(self._recorded(name, done))
        self._leave()

    def to_the_end(self, streamer: Any, prompts: Tensor, new: int) -> DiffusionOutput:
        """Take all steps; the streamer gets what was given, then the columns from `new` on, every step and at last."""
        if streamer is not None:
            streamer.put(prompts.cpu())
        draft = getattr(streamer, "put_draft", None)
        while self.rows:
            self.step()
            if draft is not None:
                draft(self.draft().sequences[:, new:].cpu())
        output = self.output()
        if streamer is not None:
            streamer.put(output.sequences[:, new:].cpu())
            streamer.end()
        return output

    def draft(self) -> DiffusionOutput:
        """The canvas as it is, and what it has cost."""
        self._write(range(len(self.rows)))
        return DiffusionOutput(sequences=self.sequences.clone(), stats=self._stats())

    def output(self) -> DiffusionOutput:
        """The result, after the last step."""
        self.sampler.check()
        buffer = self.sampler.buffer
        buffer.tokens, buffer.seen = self.tokens, self.seen
        # The logits of all steps together would be twice as large while they are stacked.
        found = {name: tuple(of) if name == "logits" else torch.stack(of) for name, of in self.kept.items() if of}
        return DiffusionOutput(sequences=self.sequences, stats=self._stats(), buffer=buffer, **found)

    def _stats(self) -> Any:
        settings = {
            **self.config.settings(), **versions(), "dtype": str(self.model.dtype), "device": str(self.model.device),
            "vocab_limit": self.sampler.choose.how["vocab_limit"],
        }  # fmt: skip
        masked = int(self.sampler.progress.masked.sum()) if self.rows else 0
        return replace(
            self.sampler.stats, seed=self.seed, seconds=time.perf_counter() - self.start, settings=settings,
            new_tokens=self.wanted - self.given_up - masked, reused_slots=self.reused,
        )  # fmt: skip

    def _end(self) -> None:
        """Give up what the rows that end now have beyond their ends."""
        sampler = self.sampler
        ends = self.ending.ends(sampler.canvas, self.rows)
        if ends is None:
            return
        beyond = sampler.canvas.cut(column(ends, self.tokens.device), self.pad)
        sampler.seen = sampler.seen & ~beyond
        self.given_up += int(beyond.sum())
        sampler.progress.masked[np.array(ends) <= sampler.canvas.row_lengths] = 0

    def _recorded(self, name: str, done: Pass | None) -> Tensor:
        """A record of this step with all rows of the batch."""
        make, gone = RECORDS[name]
        found = make(self.sampler.canvas, done, self.model)
        if name == "history":
            self.sequences[self.rows] = found
            return self.sequences.clone()
        if len(self.rows) == len(self.sequences) and self.rows == sorted(self.rows):
            return found
        wide = found.new_full((len(self.sequences), *found.shape[1:]), gone)
        wide[self.rows] = found
        return wide

    def _write(self, rows: Any) -> None:
        """Bring the sequences of these rows of the canvas up to date."""
        rows = list(rows)
        self.sequences[[self.rows[row] for row in rows]] = self.sampler.canvas.sequences()[rows]

    def _leave(self) -> None:
        """Take finished rows off the canvas and out of the buffer."""
        masked = self.sampler.progress.masked
        finished, others = np.flatnonzero(masked == 0).tolist(), np.flatnonzero(masked).tolist()
        if not finished:
            return
        self._write(finished)
        numbers = [self.rows[row] for row in finished]
        self.tokens[numbers] = self.sampler.canvas.tokens[finished, :-1]
        self.seen[numbers] = self.sampler.seen[finished]
        self.rows = [self.rows[row] for row in self.sampler.keep(others)] if others else []


def pad_id(model: Any, config: DiffusionConfig) -> int:
    """What a row is filled up with beyond its end."""
    eos = (config.eos_token_id or [None])[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    known = (config.pad_token_id, model.spec.pad_token_id, eos, model.spec.eos_token_id, 0)
    return next(number for number in known if number is not None)


def _seed(given: int | list[int] | None, rows: int, generator: torch.Generator | None) -> int | list[int]:
    if given is not None:
        return given
    device = generator.device if generator else "cpu"
    drawn = torch.randint(2**62, (rows,), generator=generator, device=device).tolist()
    return drawn[0] if rows == 1 else drawn


def _listed(name: str, given: Any, kind: type) -> Any:
    """One processor or criterion, a list of them, or none, as transformers' list of that kind, or None."""
    if given is None:
        return None
    listed = given if isinstance(given, list | tuple) else [given]
    for one in listed:
        if not callable(one):
            raise TypeError(f"{name} must be callable, as in transformers, or a list of such, got {one!r}")
    return (given if isinstance(given, kind) else kind(listed)) or None


def take_over(sampler: Sampler, buffer: KVBuffer) -> int:
    """Copy the keys and values of the prefixes that the rows share with an earlier text, and spare them.

    Returns:
        How many slots, all rows.

    Raises:
        ValueError: the buffer is not that of a finished generation, or of another model, batch or kind.
    """
    spec, canvas, own = sampler.model.spec, sampler.canvas, sampler.buffer
    if not isinstance(buffer, KVBuffer) or buffer.tokens is None:
        raise ValueError("buffer must be the buffer of an output of dkv.generate")
    if isinstance(sampler.policy, NoCache):
        raise ValueError("buffer goes with a cache policy: without one every pass computes every slot")
    if sampler.branches == 2 or len(buffer.tokens) != buffer.batch:
        raise ValueError("buffer does not go with cfg_scale: without its text, the answer of before was no mask")
    if buffer.batch != own.batch or buffer.rotated != own.rotated:
        raise ValueError(
            f"buffer has {buffer.batch} rows with rotated_keys={buffer.rotated}, the call has {own.batch} with "
            f"rotated_keys={own.rotated}"
        )
    found = buffer.kind
    if found is not None and found != (spec.num_layers, spec.num_kv_heads, spec.head_dim, sampler.model.dtype):
        raise ValueError(f"buffer is of another model: it has layers, heads, head size and dtype {found}")
    size = min(buffer.length, canvas.size)
    same = buffer.tokens[:, :size].to(canvas.tokens.device) == canvas.tokens[:, :size]
    shared = (same & ~canvas.masked[:, :size]).cumprod(1).bool() & buffer.seen[:, :size] & canvas.everywhere[:, :size]
    spared = torch.zeros_like(canvas.masked)
    spared[:, :size] = shared
    if sampler.shifted:
        spared &= ~sources(canvas.masked)
    own.copy_from(buffer, size)
    sampler.spared, sampler.seen = spared, spared.clone()
    return int(spared.sum())
