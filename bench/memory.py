"""What a step allocates, beside the weights and the keys and values.

Allocations are those that PyTorch's allocators report to `torch.profiler`, on the CPU as on CUDA. A
`TorchDispatchMode` that follows the storages of results was tried as well: it sees an operation's
results alone. What an operation needs inside, such as the partial sums of attention and the operand
that it casts or makes contiguous, never shows, and that is where copies hide. Neither sees the scratch
that oneDNN and BLAS take from the system by themselves.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import dkv
from dkv import kernels
from dkv.bench import published
from dkv.bench.options import LINEUP, Options
from dkv.bench.report import columns
from dkv.bench.steps import full_steps, start
from dkv.common.bar import Bar
from dkv.engine.engine import StepResult
from dkv.models import Transformer

MB = 1e6
# Device types as the profiler numbers them; ROCm goes by the number of CUDA.
DEVICE_TYPES = {"cpu": 0, "cuda": 1}
# What is marked in a trace.
BUFFER, STEP, PASS = "dkv buffer", "dkv step", "dkv pass"
KINDS = {True: "full", False: "cached"}
# Of [rows, V] float32 at once: one scratch, and the product in half precision that it was made from.
ONE_SCRATCH = 1.6

# Start and end, in the microseconds of a trace.
Span = tuple[float, float]
ALWAYS = (-inf, inf)


@dataclass(frozen=True)
class Trace:
    """Allocations of a call in their order, and what was marked in it.

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

    def largest(self, span: Span = ALWAYS) -> int:
        """Bytes of the largest single allocation."""
        return max((size for _, size in self._sizes(span)), default=0)


def record(call: Callable[[], Any], device: str = "cpu") -> tuple[Any, Trace]:
    """The result of a call and what it allocated on devices of a type, "cpu" or "cuda".

    Raises:
        ValueError: another type.
    """
    if device not in DEVICE_TYPES:
        raise ValueError(f"device must be one of {', '.join(DEVICE_TYPES)} for memory to be traced, got {device!r}")
    # Otherwise the profiler announces every start and stop on the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
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
    return result, Trace(changes, {name: sorted(spans) for name, spans in marks.items()})


def peak(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that a call held at once on devices of a type beyond those alive before."""
    return record(call, device)[1].peak()


def weight_bytes(model: Transformer) -> int:
    """Bytes of all weights, packed ones included."""
    return model.num_parameters * model.dtype.itemsize


@dataclass(frozen=True)
class _Marked:
    """The model, its passes marked in the trace: what a step allocates after its pass is the choice of tokens."""

    model: Transformer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with record_function(PASS):
            return self.model.step(*args, **kwargs)


def _ours(options: Options, policy: str) -> list[dict[str, Any]]:
    """The first full and the first cached step of a generation by dkv."""
    model, found = options.model, []

    def call() -> None:
        results: list[StepResult] = []
        hooks = [lambda engine, result: results.append(result)]
        engine = start(options, {**LINEUP[policy], "steps": options.steps}, options.new, hooks)
        spec = model.spec
        like = model.embed.weight.new_empty(options.batch, 1, spec.num_kv_heads, spec.head_dim)
        with record_function(BUFFER):
            for layer in range(spec.num_layers):
                engine.cache.layer(layer, like=like)
        engine.model = _Marked(model)
        full = full_steps(engine)
        wanted = {full.index(kind): kind for kind in (True, False) if kind in full}
        for step in range(max(wanted) + 1):
            # Without what earlier steps left: a step's scratch is then counted with it.
            engine.workspace = engine.sampler.workspace = kernels.Workspace()
            if step not in wanted:
                engine.step()
                continue
            with record_function(STEP):
                engine.step()
            logits = results[-1].forward.slots.numel() * spec.vocab_size * 4
            found.append({"kind": KINDS[wanted[step]], "logits": logits, "scratch": engine.workspace.nbytes})

    _, trace = record(call, model.device.type)
    for row, (begin, end) in zip(found, trace.marks[STEP], strict=True):
        (chosen,) = [stop for at, stop in trace.marks[PASS] if begin <= at <= end]
        # Half of the logits or more is no bookkeeping.
        held = trace.held((chosen, end), least=row["logits"] // 2)
        row |= {"buffer": trace.peak(trace.marks[BUFFER][0]), "copies": held / row["logits"]}
        row |= {"peak": trace.peak((begin, end)), "largest": trace.largest((begin, end))}
    return found


class _Enough(Exception):
    """The steps to be measured have been run."""


def _eager(options: Options, policy: str) -> list[dict[str, Any]]:
    """The last full step before a cached one of the eager baseline, and that; of plain decoding the first step."""
    settings, model, kinds = LINEUP[policy], options.eager, []
    plain = isinstance(settings.get("cache", dkv.NoCache()), dkv.NoCache)

    def on_step(full: bool, seconds: float) -> None:
        with record_function(STEP):
            kinds.append(KINDS[full])
        if plain or not full:
            raise _Enough

    def call() -> None:
        with suppress(_Enough):
            published.generate(
                model, options.prompts(), new=options.new, steps=options.steps, on_step=on_step, **settings
            )

    _, trace = record(call, model.device.type)
    ends = [at for at, _ in trace.marks[STEP]]
    rows = {}
    for kind, begin, end in zip(kinds, (-inf, *ends), ends, strict=False):
        peaks = {"peak": trace.peak((begin, end)), "largest": trace.largest((begin, end))}
        nothing = dict.fromkeys(("logits", "scratch", "copies"))
        rows[kind] = {"kind": kind, "buffer": trace.alive(begin), **peaks, **nothing}
    return list(rows.values())


def _row(policy: str, way: str, weights: int, found: dict[str, Any]) -> dict[str, Any]:
    sizes = {"weights": weights} | {name: found[name] for name in ("buffer", "scratch", "peak", "largest", "logits")}
    megabytes = {f"{name}_mb": None if size is None else size / MB for name, size in sizes.items()}
    return {"policy": policy, "way": way, "kind": found["kind"], **megabytes, "copies": found["copies"]}


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """Trace a full and a cached step of every policy, by dkv and by the eager baseline.

    A step is measured where it needs most, at the start, when nearly all slots are masked. Its scratch
    counts as its own, although a generation allocates it once. The rotary tables, which stay with the
    model, are made before.

    Returns:
        rows, sizes in units of 1e6 bytes; None: not told of the baseline.
            weights_mb: of the model, packed ones included.
            buffer_mb: keys and values; of the baseline all that is alive between two steps.
            scratch_mb: the workspace that the step needs, a part of its peak.
            peak_mb: most that the step holds at once beyond weights and buffer.
            largest_mb: its largest single allocation.
            logits_mb: [rows, V] float32 of the slots that it scores.
            copies: how many such the choice of tokens holds at once, scratch included.
        refused: why a policy has no baseline.

    Raises:
        ValueError: neither on a CPU nor on a CUDA device, or the canvas is longer than the model allows.
    """
    found: dict[str, Any] = {"rows": [], "refused": {}}
    ways = {"dkv": _ours} | ({"eager": _eager} if options.eager is not None else {})
    _ours(options, options.policies[0])  # makes the rotary tables
    total = len(options.policies) * len(ways)
    with Bar(total, "run", pause=0) as bar:
        for way, run in ways.items():
            model = options.model if way == "dkv" else options.eager
            for policy in options.policies:
                bar.set_description(f"{policy}, {way}")
                try:
                    found["rows"] += [_row(policy, way, weight_bytes(model), step) for step in run(options, policy)]
                except ValueError as error:
                    if way == "dkv":
                        raise
                    found["refused"][policy] = str(error)
                bar.update()
    return found


SHOWN = ("weights", "buffer", "scratch", "peak", "largest", "logits")


def table(found: dict[str, Any]) -> str:
    """The figures of `measure` for a terminal."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:,.2f}"

    lines = [
        (row["policy"], row["way"], row["kind"], *(cell(row[f"{name}_mb"]) for name in SHOWN), cell(row["copies"]))
        for row in found["rows"]
    ]
    return "\n".join((
        "MB of a step; peak: beyond weights and buffer; copies: how many of the logits the choice holds at once",
        columns(("policy", "by", "step", *SHOWN, "copies"), lines, left=3), "",
        *verdict(found["rows"]), *(f"No baseline for {name}: {why}." for name, why in found["refused"].items()),
    ))  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Whether a step of dkv holds more than one scratch of [rows, V] float32, and how it compares, in words."""
    ours = {(row["policy"], row["kind"]): row for row in rows if row["way"] == "dkv"}
    said = [
        f"The {kind} step of {policy} holds {row['copies']:.2f} copies of its logits at once: MORE THAN ONE SCRATCH."
        for (policy, kind), row in ours.items()
        if row["copies"] > ONE_SCRATCH
    ] or ["No step holds more than one scratch of [rows, V] float32."]
    fresh = sum(row["copies"] - row["scratch_mb"] / row["logits_mb"] > 0.5 for row in ours.values())
    if fresh:
        said.append(f"In {fresh} of {len(ours)} steps it is allocated anew, not taken from the workspace.")
    ratios = []
    for row in rows:
        if row["way"] == "eager":
            own = ours[row["policy"], row["kind"]]
            held = [x["buffer_mb"] + x["peak_mb"] for x in (row, own)]
            words = f"{row['policy']}, {row['kind']} step: {held[0]:,.1f} and {held[1]:,.1f} MB"
            ratios.append((held[0] / held[1], words))
    if ratios:
        # A list: steps may have the same ratio.
        ratios.sort(key=lambda pair: pair[0])
        (low, least), (high, most) = ratios[0], ratios[-1]
        span = f"{low:.1f} ({least})" if len(ratios) == 1 else f"{low:.1f} ({least}) to {high:.1f} ({most})"
        said.append(f"Beyond its weights the baseline holds {span} times as much as dkv.")
    return said
