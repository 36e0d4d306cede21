"""Allocations of a call: those that PyTorch's allocators report to `torch.profiler`, on the CPU as on CUDA.

What an operation needs inside shows too, such as the partial sums of attention and the operand that it casts or makes
contiguous, which a `TorchDispatchMode` does not see. The scratch that oneDNN and BLAS take from the system does not.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Device types as the profiler numbers them; ROCm goes by the number of CUDA.
DEVICE_TYPES = {"cpu": 0, "cuda": 1}

# Start and end, in the microseconds of a trace.
Span = tuple[float, float]
ALWAYS = (-inf, inf)


@dataclass(frozen=True)
class Allocations:
    """Of a call, in their order, and what was marked in it.

    Attributes:
        changes: (time, address, bytes), the bytes negative where memory was freed.
        marks: by name, the spans of `record_function`, in their order.
    """

    changes: list[tuple[float, int, int]]
    marks: dict[str, list[Span]]

    def _sizes(self, span: Span) -> list[tuple[int, int]]:
        return [(address, size) for when, address, size in self.changes if span[0] <= when <= span[1]]

    def peak(self, span: Span = ALWAYS) -> int:
        """Most bytes alive at once beyond those alive when the span begins."""
        return max(accumulate((size for _, size in self._sizes(span)), initial=0))

    def held(self, span: Span, least: int) -> int:
        """Most bytes alive at once of what the span itself allocated, in pieces of `least` bytes or more."""
        alive: dict[int, int] = {}
        top = 0
        for address, size in self._sizes(span):
            if size < 0:
                alive.pop(address, None)
            elif size >= least:
                alive[address] = size
                top = max(top, sum(alive.values()))
        return top

    def alive(self, when: float) -> int:
        """Bytes that were allocated in the call before a time and are not yet freed then."""
        return sum(size for at, _, size in self.changes if at < when)

    def most(self, span: Span = ALWAYS) -> dict[str, int]:
        """The "peak", and the "largest" single allocation."""
        return {"peak": self.peak(span), "largest": max((size for _, size in self._sizes(span)), default=0)}


def record(call: Callable[[], Any], device: str = "cpu") -> tuple[Any, Allocations]:
    """The result of a call and what it allocated on devices of a type, "cpu" or "cuda".

    Raises:
        ValueError: another type.
    """
    if device not in DEVICE_TYPES:
        raise ValueError(f"device must be one of {', '.join(DEVICE_TYPES)} for memory to be traced, got {device!r}")
    # Otherwise the profiler announces every start and stop on the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # What is garbage already is not to be freed in the trace.
    gc.freeze()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
    finally:
        gc.unfreeze()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    marks: dict[str, list[Span]] = {}
    changes = []
    for event in events:
        if event["name"] == "[memory]" and event["args"]["Device Type"] == DEVICE_TYPES[device]:
            changes.append((event["ts"], event["args"]["Addr"], event["args"]["Bytes"]))
        elif event.get("cat") == "user_annotation":
            marks.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    changes.sort(key=lambda change: change[0])
    return result, Allocations(changes, {name: sorted(spans) for name, spans in marks.items()})


def peak(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that a call held at once on devices of a type beyond those alive before."""
    if device != "cuda":
        return record(call, device)[1].peak()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
