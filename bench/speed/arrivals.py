"""Requests that arrive at random times, and two ways to serve them: rows that are joined, and static batches."""

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

import dkv
from dkv.bench.options import Options

# The shortest prompt and answer, as a part of the longest. Lengths are even in their logarithm: many short, few long.
SHORTEST = 16


@dataclass(frozen=True)
class Ask:
    """A request before it is served.

    Attributes:
        number: of its kind, from 0; also its seed.
        prompt: ids.
        new: slots to fill.
        at: when it arrives, in seconds of the run.
    """

    number: int
    prompt: list[int]
    new: int
    at: float = 0.0


@dataclass(frozen=True)
class Answered:
    """A request that was served.

    Attributes:
        ask: what was asked.
        tokens: the answer.
        first, whole: seconds from its arrival to the first token that the client may see, and to the last one.
    """

    ask: Ask
    tokens: list[int]
    first: float
    whole: float


def drawn(options: Options, count: int, seed: int = 0) -> list[Ask]:
    """Seeded requests of ragged lengths, up to those of the options, that arrive once a second in the mean."""
    draw, spec = torch.Generator().manual_seed(seed), options.model.spec
    places = torch.rand(3, count, generator=draw, dtype=torch.float64)
    times = -(1 - places[2]).log()
    prompts, news = (
        (most / SHORTEST ** (1 - place)).round().clamp(min=1).int().tolist()
        for most, place in zip((options.prompt, options.new), places[:2], strict=True)
    )
    asks = []
    for number, (length, new, at) in enumerate(zip(prompts, news, times.cumsum(0).tolist(), strict=True)):
        ids = torch.randint(spec.vocab_size - 1, (length,), generator=draw)
        asks.append(Ask(number, (ids + (ids >= spec.mask_token_id)).tolist(), new, at))
    return asks


def at_rate(asks: Iterable[Ask], rate: float) -> list[Ask]:
    """The same requests, so many a second; all at once at an infinite rate."""
    return [replace(ask, at=ask.at / rate) for ask in asks]


class Clock:
    """Seconds of a run, in which nobody waits for the next arrival: an idle machine is not watched."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._begin

    def skip_to(self, at: float) -> None:
        """Go on at this time, if it is not over."""
        self._begin -= max(at - self.now(), 0)


@dataclass(frozen=True)
class Served:
    """How requests are served.

    Attributes:
        model: from `dkv.load`.
        rows: that are worked on at a time, or of a static batch.
        slots: of a row.
        settings: of all requests.
    """

    model: Any
    rows: int
    slots: int
    settings: dict[str, Any]

    def llm(self) -> Any:
        """An `LLM` that has answered once."""
        llm = dkv.LLM(self.model, max_slots=self.rows * self.slots, max_length=self.slots, **self.settings)
        llm.generate([[0]], max_new_tokens=2, progress=False)
        return llm

    def continuous(self, asks: Sequence[Ask]) -> list[Answered]:
        """By `dkv.LLM`: a request takes a free row between two steps."""
        llm, left, going, found = self.llm(), deque(asks), {}, []
        clock = Clock()
        while left or going:
            if not going:
                clock.skip_to(left[0].at)
            while left and left[0].at <= clock.now():
                ask = left.popleft()
                going[llm.add(ask.prompt, max_new_tokens=ask.new, seed=ask.number)] = ask
            for request in llm.step():
                ask, stats = going.pop(request), request.stats
                whole = clock.now() - ask.at
                found.append(Answered(ask, request.tokens.tolist(), whole - stats.ended + stats.first_token, whole))
        return found

    def static(self, asks: Sequence[Ask]) -> list[Answered]:
        """By `dkv.generate`: those that wait, `rows` at most, are one batch, and are answered when all of it is done.

        Prompts are padded to the longest one, and every row ends at its own length. Of padding and of finished rows
        nothing is computed.
        """
        left, found = deque(asks), []
        clock = Clock()
        while left:
            clock.skip_to(left[0].at)
            batch = []
            while left and len(batch) < self.rows and left[0].at <= clock.now():
                batch.append(left.popleft())
            answers = self.at_once(batch)
            for ask, tokens in zip(batch, answers, strict=True):
                whole = clock.now() - ask.at
                found.append(Answered(ask, tokens, whole, whole))
        return found

    def at_once(self, batch: Sequence[Ask]) -> list[list[int]]:
        """The answers to a batch by `dkv.generate`."""
        flipped = [torch.tensor(ask.prompt[::-1]) for ask in batch]
        ids = pad_sequence(flipped, batch_first=True, padding_value=-1).flip(1).to(self.model.device)
        news, seeds = [ask.new for ask in batch], [ask.number for ask in batch]
        how = {"max_new_tokens": news, "seed": seeds, **self.settings}
        output = dkv.generate(self.model, ids.clamp(min=0), (ids >= 0).long(), **how)
        return [row[:new] for row, new in zip(output.sequences[:, ids.shape[1] :].tolist(), news, strict=True)]


def percentile(values: Iterable[float], share: float) -> float:
    """The least value that so large a share is not above."""
    found = sorted(values)
    return found[max(math.ceil(share * len(found)), 1) - 1]


def summary(found: Sequence[Answered]) -> dict[str, float]:
    """Requests and tokens per second, and of the seconds to the first token, a token and in all p50 and p99."""
    begin, end = min(x.ask.at for x in found), max(x.ask.at + x.whole for x in found)
    told = {"requests_per_second": len(found), "tokens_per_second": sum(len(x.tokens) for x in found)}
    told = {name: count / (end - begin) for name, count in told.items()}
    seconds = {"first": [x.first for x in found], "per_token": [x.whole / len(x.tokens) for x in found]}
    for name, values in (seconds | {"whole": [x.whole for x in found]}).items():
        told |= {f"{name}_p50": percentile(values, 0.5), f"{name}_p99": percentile(values, 0.99)}
    return told
