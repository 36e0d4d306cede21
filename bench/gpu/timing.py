"""Timing of single calls, in turn and by the events of a GPU."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dkv.bench.timing import in_turn, synchronise

FLUSH_BYTES = 256 << 20
FEWEST, MOST = 5, 60


@dataclass(frozen=True)
class Time:
    """Milliseconds: the median, and the tenth and ninetieth percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ms: list[float]) -> "Time":
        ordered = sorted(ms)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(last * 0.1)], ordered[round(last * 0.9)])


class Timer:
    """Times calls on a device, each with a cold cache as in a model, where every layer has its own buffers.

    Args:
        device: a GPU is timed by its own events; elsewhere the times only rehearse the script.
        seconds: about how long to measure each contender.
    """

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds, self.gpu = device, seconds, device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.gpu else None

    def once(self, call: Callable[[], object]) -> Callable[[], float]:
        """Start one call; the result gives its milliseconds once the device has finished."""
        if not self.gpu:
            start = time.perf_counter()
            call()
            ms = (time.perf_counter() - start) * 1e3
            return lambda: ms
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Also gives the host time to queue the call, so that its launches are not what is timed.
        self.flush.zero_()
        first.record()
        call()
        last.record()
        return lambda: first.elapsed_time(last)

    def compare(self, contenders: dict[str, Callable[[], object]]) -> dict[str, Time]:
        """Time all contenders, which have run before, in turn."""
        calls = {name: partial(self.once, call) for name, call in contenders.items()}
        synchronise(self.device)
        guess = in_turn(calls)
        synchronise(self.device)
        longest = max(elapsed() for (elapsed,) in guess.values())
        rounds = int(min(MOST, max(FEWEST, self.seconds * 1e3 / max(longest, 1e-3)))) if self.gpu else 2
        pending = in_turn(calls, rounds)
        synchronise(self.device)
        return {name: Time.of([elapsed() for elapsed in every]) for name, every in pending.items()}
