"""How the time per generated slot grows with the length of the canvas.

One slot is decoded per step, so plain decoding sends all slots through the network once per generated
slot. A length is timed in samples: step 0, then some full and some cached steps, each kind spread
evenly over the generation; between them the canvas is filled without computing. That changes no step's
work, which depends on how many slots are masked and not on their tokens. The sum is the mean of each
kind times its number. Where a length is affordable the generation is also run as it is: then its time
is the one reported, and the difference shows what the samples are worth.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import dkv
from dkv.bench import report
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.steps import full_steps, skip, start
from dkv.bench.timing import timed
from dkv.common.bar import Bar
from dkv.models import ModelSpec

LENGTHS = (64, 128, 256, 512, 1024, 2048)
# Full and cached steps timed per length: the former take longer, the latter change more as slots are filled.
SAMPLES = (3, 9)
# Seconds: what a policy may take in all, and up to which estimate a generation is run as it is.
BUDGET, AFFORDABLE = 60, 4
# Largest exponent that decoding with a constant active set and no refresh may have.
CONSTANT = 0.3
# Of the line-up: what the exponent should be, and how much it may be (None: no limit).
THEORY: dict[str, tuple[str, float | None]] = {
    "plain": ("all slots in every step: 1 by the products, towards 2 by attention", None),
    "decode 8": ("as plain, of fewer slots: half of the new ones on average", None),
    "greedy, no refresh": (f"at most {CONSTANT}: only attention over the buffer grows", CONSTANT),
    "greedy 16": ("between the two: every 16th step is full", None),
}
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)


def operations(spec: ModelSpec, active: int, rows: int, slots: int) -> int:
    """Additions and multiplications of a pass over `active` slots, `rows` of which are scored.

    Both count all rows of the batch; `slots` are those of one canvas.
    """
    d, query, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    # Keys and values of every active slot; in the last layer the rest at the scored rows alone.
    rest = d * query * 2 + 3 * d * spec.intermediate_size + 2 * slots * query
    through = (spec.num_layers - 1) * active + rows
    return 2 * (spec.num_layers * active * 2 * d * kv + through * rest + rows * d * spec.vocab_size)


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, each in the middle of an equal share of them."""
    count = min(count, len(steps))
    return [steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)]


def estimate(
    options: Options, settings: dict[str, Any], new: int, samples: tuple[int, int] = SAMPLES
) -> dict[str, float]:
    """What a generation of `new` slots takes, from `samples` of its full and of its cached steps.

    Returns:
        "seconds", "computed" (slots sent through the network) and "operations", over all steps and rows.
    """
    engine = start(options, settings, new)
    full, size, at = full_steps(engine), engine.rows.size, 0
    kinds = [[step for step in range(1, len(full)) if full[step] == kind] for kind in (True, False)]
    chosen = [[0], *map(spread, kinds, samples)]
    found: dict[int, tuple[float, int, int]] = {}
    for step in sorted(step for kind in chosen for step in kind):
        if step > at:
            skip(engine, step - at)
        at = step + 1
        active, rows = sum(engine.status.active), engine.shape().scored
        seconds, _ = timed(engine.step, options.model.device)
        found[step] = (seconds, active, operations(options.model.spec, active, rows, size))
    sums = [
        [len(kind) * statistics.fmean(values) for values in zip(*(found[step] for step in steps), strict=True)]
        for kind, steps in zip(([0], *kinds), chosen, strict=True)
        if steps
    ]
    return dict(zip(("seconds", "computed", "operations"), map(sum, zip(*sums, strict=True)), strict=True))


def fit(lengths: Sequence[float], times: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The exponent of a power law by least squares on logarithms, and its 95 % interval.

    The interval comes from the residuals; with two points there are none, and it is (None, None).

    Raises:
        ValueError: fewer than two different lengths.
    """
    if len(set(lengths)) < 2:
        raise ValueError(f"an exponent needs at least two lengths, got {list(lengths)}")
    x, y = [math.log(v) for v in lengths], [math.log(v) for v in times]
    slope, offset = statistics.linear_regression(x, y)
    freedom = len(x) - 2
    if freedom == 0:
        return slope, None, None
    residual = sum((b - slope * a - offset) ** 2 for a, b in zip(x, y, strict=True))
    mean = statistics.fmean(x)
    error = math.sqrt(residual / freedom / sum((a - mean) ** 2 for a in x))
    half = STUDENT[min(freedom, len(STUDENT)) - 1] * error
    return slope, slope - half, slope + half


def _row(options: Options, policy: str, new: int) -> tuple[dict[str, Any], float]:
    """A length, and the seconds that its samples took."""
    begin, settings = time.perf_counter(), of_lineup(policy).settings
    found = estimate(options, settings, new)
    cost, seconds, slots = time.perf_counter() - begin, found["seconds"], new * options.batch
    row = {"policy": policy, "new": new, "prompt": options.prompt, "estimate": seconds, "whole": seconds <= AFFORDABLE}
    if row["whole"]:
        told = {"max_new_tokens": new, "schedule": "blocks", "seed": 0, **settings}
        seconds = dkv.generate(options.model, options.prompts(), **told).stats.seconds
    row |= {"seconds": seconds, "ms_per_slot": 1e3 * seconds / slots}
    return row | {"operations_per_slot": found["operations"] / slots}, cost


def _policy(options: Options, policy: str, bar: Bar) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the lengths that fit the budget, and the lengths left out with the reason."""
    rows: list[dict[str, Any]] = []
    positions, begin, costs = options.model.spec.max_positions, time.perf_counter(), []
    for at, new in enumerate(LENGTHS):
        bar.set_description(f"{policy}, {new} slots")
        left = max(BUDGET - (time.perf_counter() - begin), 0)
        # Each length is taken to cost as many times the one before as that did; the second, four times the first.
        growth = max(costs[-1] / costs[-2], 1) if len(costs) > 1 else 4
        expected, why = costs[-1] * growth if costs else 0, ""
        if options.prompt + new > positions:
            why = f"the model has {positions} positions"
        elif expected > left:
            why = f"its samples would take about {expected:.1f} s, and {left:.1f} s are left of {BUDGET}"
        if why:
            bar.update(len(LENGTHS) - at)
            return rows, [{"policy": policy, "new": missing, "why": why} for missing in LENGTHS[at:]]
        row, cost = _row(options, policy, new)
        rows.append(row)
        costs.append(cost)
        bar.update()
    return rows, []


def _fit_of(policy: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    slots = [row["prompt"] + row["new"] for row in rows]
    exponent, low, high = fit(slots, [row["ms_per_slot"] for row in rows])
    counted = fit(slots, [row["operations_per_slot"] for row in rows])[0]
    found = {"policy": policy, "exponent": exponent, "low": low, "high": high, "counted": counted}
    return found | dict(zip(("theory", "limit"), THEORY[policy], strict=True))


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """Time every contender at every length that its budget allows.

    The lengths stand in for `options.new`; every slot has a step of its own, whatever `options.steps`.

    Returns:
        "rows" (seconds of a generation, milliseconds per generated slot of any row, whether it was run as
        it is), "fits" (exponents over prompt + new slots; "counted" is that of the arithmetic) and
        "left_out" (lengths that were not run, and why).

    Raises:
        ValueError: the model has no room for the prompt and the shortest length.
    """
    found: dict[str, Any] = {"rows": [], "fits": [], "left_out": []}
    with Bar(len(THEORY) * len(LENGTHS), "run", pause=0) as bar:
        for policy in THEORY:
            estimate(options, of_lineup(policy).settings, LENGTHS[0], samples=(1, 1))
            rows, left_out = _policy(options, policy, bar)
            found["rows"] += rows
            found["left_out"] += left_out
            if len(rows) > 1:
                found["fits"].append(_fit_of(policy, rows))
    return found


FITS = {
    "policy": "{policy}",
    "theory": "{theory}",
    "exponent": "{exponent:.2f}",
    "95 % interval": lambda fit: "-" if fit["low"] is None else f"{fit['low']:.2f} to {fit['high']:.2f}",
    "arithmetic": "{counted:.2f}",
}


def table(found: dict[str, Any]) -> str:
    """The figures of `measure` for a terminal."""
    rows, lengths = found["rows"], sorted({row["new"] for row in found["rows"]})
    text = {(row["policy"], row["new"]): f"{'' if row['whole'] else '~'}{row['ms_per_slot']:,.1f}" for row in rows}
    policies = dict.fromkeys(row["policy"] for row in rows)
    cells = [(policy, *(text.get((policy, new), "-") for new in lengths)) for policy in policies]
    samples = f"{SAMPLES[0]} full and {SAMPLES[1]} cached steps"
    lines = [f"milliseconds per generated slot, prompt {rows[0]['prompt']}; ~: estimated from {samples}"]
    lines += [report.columns(("new slots", *map(str, lengths)), cells), ""]
    if found["fits"]:
        lines.append("exponent of the time per generated slot over prompt + new slots, and of its arithmetic")
        lines.append(report.table(found["fits"], FITS, left=2))
    held = [fit for fit in found["fits"] if fit["limit"] is not None]
    lines += [f"{fit['policy']} {_held(fit)} its limit of {fit['limit']}." for fit in held]
    if errors := [row["estimate"] / row["seconds"] - 1 for row in rows if row["whole"]]:
        typical = f"{statistics.median(errors):+.0%} off in the median, {max(errors, key=abs):+.0%} at most"
        lines.append(f"Estimates of {len(errors)} whole generations: {typical}.")
    lines += [f"Left out: {row['policy']} at {row['new']} new slots ({row['why']})." for row in found["left_out"]]
    return "\n".join(lines)


def _held(fit: dict[str, Any]) -> str:
    """Whether an exponent keeps its limit, as far as its interval tells."""
    if fit["low"] is None:
        return "was run at too few lengths to tell whether it keeps"
    if fit["high"] <= fit["limit"]:
        return "keeps"
    return "MISSES" if fit["low"] > fit["limit"] else "varies too much to tell whether it keeps"
