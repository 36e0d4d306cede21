"""What a step allocates, beside the weights and the keys and values; `dkv.bench.speed.allocations` traces it."""

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from operator import itemgetter
from typing import Any

import torch
from torch.profiler import record_function

import dkv
from dkv import kernels
from dkv.bench import report
from dkv.bench.baselines import dkv_cache
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.speed.allocations import record
from dkv.bench.steps import full_steps, start
from dkv.bench.timing import in_turn
from dkv.common.bar import Bar
from dkv.engine.engine import StepResult
from dkv.models import Transformer

# What is marked in a trace.
BUFFER, STEP, PASS = "dkv buffer", "dkv step", "dkv pass"
KINDS = {True: "full", False: "cached"}
# Of [rows, V] float32 at once: one scratch, and the product in half precision that it was made from.
ONE_SCRATCH = 1.6
SIZES = ("weights", "buffer", "scratch", "peak", "largest", "logits")


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
    model, spec, found = options.model, options.model.spec, []

    def call() -> None:
        results: list[StepResult] = []
        hooks = [lambda engine, result: results.append(result)]
        engine = start(options, {**of_lineup(policy).settings, "steps": options.steps}, options.new, hooks)
        like = model.embed.weight.new_empty(options.batch, 1, spec.num_kv_heads, spec.head_dim)
        with record_function(BUFFER):
            for layer in range(spec.num_layers):
                engine.cache.layer(layer, like=like)
        engine.model, full = _Marked(model), full_steps(engine)
        wanted = {full.index(kind): kind for kind in KINDS if kind in full}
        for step in range(max(wanted) + 1):
            # Without what earlier steps left: a step's scratch is then counted with it.
            engine.workspace = engine.sampler.workspace = kernels.Workspace()
            with record_function(STEP) if step in wanted else nullcontext():
                engine.step()
            if step in wanted:
                logits = len(results[-1].forward.packed.slots) * spec.vocab_size * 4
                found.append({"kind": KINDS[wanted[step]], "logits": logits, "scratch": engine.workspace.nbytes})

    trace = record(call, model.device.type)[1]
    for row, (begin, end) in zip(found, trace.marks[STEP], strict=True):
        (chosen,) = [stop for at, stop in trace.marks[PASS] if begin <= at <= end]
        # Half of the logits or more is no bookkeeping.
        row["copies"] = trace.held((chosen, end), least=row["logits"] // 2) / row["logits"]
        row |= {"buffer": trace.peak(trace.marks[BUFFER][0]), **trace.most((begin, end))}
    return found


class _Enough(Exception):
    """The steps to be measured have been run."""


def _eager(options: Options, policy: str) -> list[dict[str, Any]]:
    """The last full step before a cached one of the eager baseline, and that; of plain decoding the first step."""
    settings, kinds = of_lineup(policy).settings, []

    def on_step(full: bool, seconds: float) -> None:
        with record_function(STEP):
            kinds.append(KINDS[full])
        if isinstance(settings["cache"], dkv.NoCache) or not full:
            raise _Enough

    def call() -> None:
        told = {"new": options.new, "steps": options.steps, "on_step": on_step, **settings}
        with suppress(_Enough):
            dkv_cache.generate(options.eager, options.prompts(), **told)

    trace = record(call, options.eager.device.type)[1]
    ends = [at for at, _ in trace.marks[STEP]]
    rows = {
        kind: {"kind": kind, "buffer": trace.alive(begin), **trace.most((begin, end))}
        for kind, begin, end in zip(kinds, (-inf, *ends), ends, strict=False)
    }
    return list(rows.values())


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
    ways = {"dkv": (_ours, options.model)} | ({"eager": (_eager, options.eager)} if options.eager is not None else {})
    _ours(options, options.policies[0])  # makes the rotary tables

    def traced(policy: str, way: str) -> None:
        steps_of, model = ways[way]
        try:
            steps = steps_of(options, policy)
        except ValueError as error:
            if way == "dkv":
                raise
            found["refused"][policy] = str(error)
            return
        for step in steps:
            sizes = {f"{name}_mb": None if (size := step.get(name)) is None else size / 1e6 for name in SIZES}
            row = {"policy": policy, "way": way, "kind": step["kind"], **sizes, "weights_mb": weight_bytes(model) / 1e6}
            found["rows"].append(row | {"copies": step.get("copies")})

    calls = {(policy, way): partial(traced, policy, way) for way in ways for policy in options.policies}
    with Bar(len(calls), "run", pause=0) as bar:
        in_turn(calls, 1, bar, lambda _, key: ", ".join(key))
    return found


def _size(name: str) -> report.Cell:
    return lambda row: "-" if row[name] is None else f"{row[name]:,.2f}"


CELLS = {"policy": "{policy}", "by": "{way}", "step": "{kind}"}
CELLS |= {name: _size(f"{name}_mb") for name in SIZES} | {"copies": _size("copies")}


def table(found: dict[str, Any]) -> str:
    """The figures of `measure` for a terminal."""
    lines = [
        "MB of a step; peak: beyond weights and buffer; copies: how many of the logits the choice holds at once",
        report.table(found["rows"], CELLS, left=3),
        "",
        *verdict(found["rows"]),
        *(f"No baseline for {name}: {why}." for name, why in found["refused"].items()),
    ]
    return "\n".join(lines)


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
    # A list: steps may have the same ratio.
    ratios = []
    for row in (row for row in rows if row["way"] == "eager"):
        held, own = (x["buffer_mb"] + x["peak_mb"] for x in (row, ours[row["policy"], row["kind"]]))
        ratios.append((held / own, f"({row['policy']}, {row['kind']} step: {held:,.1f} and {own:,.1f} MB)"))
    if ratios:
        ends = [min(ratios, key=itemgetter(0)), max(reversed(ratios), key=itemgetter(0))]
        span = " to ".join(f"{ratio:.1f} {words}" for ratio, words in ends[: len(ratios)])
        said.append(f"Beyond its weights the baseline holds {span} times as much as dkv.")
    return said
