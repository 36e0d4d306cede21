"""What it costs to observe a pass: the attention that slots get, of all layers, against the pass.

A pass that is observed also gives the log-sum-exp of its attention, or on a CPU may keep the weights instead; then
`attention_mass` sums up every layer.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.report import columns
from dkv.bench.speed.floor import STEPS
from dkv.bench.steps import HalfWay
from dkv.bench.timing import in_turn, timed
from dkv.common.bar import Bar
from dkv.kernels.attention.op import ATTENTION
from dkv.kernels.attention.shares import Shares
from dkv.kernels.mass.op import MASS

ROUNDS = 25


def attention_calls(half_way: HalfWay) -> list[tuple[Any, ...]]:
    """The arguments of the attention of every layer of a step.

    The last layer has queries for outputs alone. An observed pass has all, so it is given those of the layer before.
    """
    calls = half_way.attention()
    return [*calls[:-1], calls[-2 if len(calls) > 1 else -1]]


def contenders(half_way: HalfWay) -> dict[str, Callable[[], float]]:
    """Seconds of the step, and of the operations of all its layers alone."""
    engine = half_way.engine
    layers, device, work = attention_calls(half_way), engine.model.device, {"workspace": engine.workspace}
    sums = []
    for q, k, v, rules, most, scale, _ in layers:
        shares = Shares()
        _, lse = ATTENTION(q, k, v, rules, most, scale, True, shares=shares, **work)
        rows = rules.query_starts, rules.query_lengths, rules.key_ranges
        weight = torch.ones(len(q), dtype=torch.promote_types(q.dtype, torch.float32), device=device)
        args = q, k, lse, weight, *rows, most, scale
        sums.append(partial(MASS, *args, shares=shares, **work))
    plain = [partial(ATTENTION, *args[:-1], False, **work) for args in layers]

    def observed() -> list[Any]:
        return [ATTENTION(*args[:-1], True, shares=Shares(), **work) for args in layers]

    return {
        "step": half_way.seconds,
        "attention": lambda: timed(lambda: [call() for call in plain], device)[0],
        "observed": lambda: timed(observed, device)[0],
        "mass": lambda: timed(lambda: [call() for call in sums], device)[0],
    }


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """A full and a cached step, half-way through a generation.

    Returns:
        {"rows": [{"kind", "slots", "active", "rows", "batch", "step_ms", "attention_ms", "observed_ms", "mass_ms",
        "share"}, ...]}: medians in milliseconds, of all layers; the share of the step is what attention takes longer
        when it is observed, and the sums.
    """
    with Bar(len(STEPS) * 4 * ROUNDS, "call") as bar:
        return {"rows": [_row(options, kind, bar) for kind in STEPS]}


def _row(options: Options, kind: str, bar: Bar) -> dict[str, Any]:
    half_way = HalfWay(options, of_lineup(STEPS[kind]).settings)
    calls = contenders(half_way)
    for call in calls.values():
        call()
    found = in_turn(calls, ROUNDS, bar)
    times = {f"{name}_ms": statistics.median(every) * 1e3 for name, every in found.items()}
    shares = [(more - less + mass) / step for step, less, more, mass in zip(*found.values(), strict=True)]
    return {"kind": kind, **half_way.sizes(), "batch": options.batch, **times, "share": statistics.median(shares)}


def table(found: dict[str, Any]) -> str:
    """A line for each kind of step."""
    heads = ("step", "active", "of slots", "batch", "step ms", "attention", "observed", "mass", "of step")
    cells = [
        (
            *(str(row[name]) for name in ("kind", "active", "slots", "batch")),
            *(f"{row[f'{name}_ms']:.2f}" for name in ("step", "attention", "observed", "mass")),
            f"{row['share']:.1%}",
        )
        for row in found["rows"]
    ]
    return columns(heads, cells)
