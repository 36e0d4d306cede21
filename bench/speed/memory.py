"""What a step allocates, beside the weights and the keys and values; `dkv.bench.speed.allocations` traces it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch.profiler import record_function

import dkv
from dkv import kernels
from dkv.bench import report
from dkv.bench.baselines import dkv_cache
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.report import shown
from dkv.bench.speed.allocations import record
from dkv.bench.steps import full_steps, start
from dkv.bench.timing import in_turn
from dkv.common.bar import Bar
from dkv.engine.engine import StepResult
from dkv.models import Transformer

MB = 1e6
# What is marked in a trace.
BUFFER, STEP, PASS = "dkv buffer", "dkv step", "dkv pass"
KINDS = {True: "full", False: "cached"}
# Of [rows, V] float32 at once: one scratch, and the product in half precision that it was made from.
ONE_SCRATCH = 1.6


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
        engine = start(options, {**of_lineup(policy).settings, "steps": options.steps}, options.new, hooks)
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
    settings, model, kinds = of_lineup(policy).settings, options.eager, []
    plain = isinstance(settings["cache"], dkv.NoCache)

    def on_step(full: bool, seconds: float) -> None:
        with record_function(STEP):
            kinds.append(KINDS[full])
        if plain or not full:
            raise _Enough

    def call() -> None:
        with suppress(_Enough):
            dkv_cache.generate(
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

    def traced(policy: str, way: str) -> None:
        model = options.model if way == "dkv" else options.eager
        try:
            steps = ways[way](options, policy)
        except ValueError as error:
            if way == "dkv":
                raise
            found["refused"][policy] = str(error)
        else:
            found["rows"] += [_row(policy, way, weight_bytes(model), step) for step in steps]

    calls = {(policy, way): partial(traced, policy, way) for way in ways for policy in options.policies}
    with Bar(len(calls), "run", pause=0) as bar:
        in_turn(calls, 1, bar, lambda _, key: ", ".join(key))
    return found


SIZES = ("weights", "buffer", "scratch", "peak", "largest", "logits")


def _size(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: shown(row[name], "{:,.2f}") or "-"


CELLS = {
    "policy": lambda row: row["policy"],
    "by": lambda row: row["way"],
    "step": lambda row: row["kind"],
    **{name: _size(f"{name}_mb") for name in SIZES},
    "copies": _size("copies"),
}


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
