"""A step against its floor: the matrix products that it cannot do without, timed by themselves in turn with it.

Where the weights are packed the products of the floor are packed too, so that it is as low as this machine and
this build of PyTorch let it be; everything else that a step does is what the ratio is above 1.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv import kernels
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.report import columns
from dkv.bench.steps import HalfWay
from dkv.bench.timing import in_turn, synchronise, timed
from dkv.common.bar import Bar
from dkv.core.sequences import Sequences
from dkv.models.packing import PackedHead, PackedLayer, PackedLinear

ROUNDS = 25
# What a step is divided into, which modules and operations belong to a part, and why it exceeds its products.
PARTS = {
    "embedding": "no product in it",
    "norm + projection": "the norms, which read and write the states of every active slot once more",
    "rope + scatter": "no product in it: rotation, and the writes into the buffer",
    "attention": "the softmax between its two products",
    "MLP": "the norm",
    "head + choice": "the largest logit, and the sum of all exponentials",
    "commit": "no product in it",
    "Python": "the policy, the counts, and the calls between the parts",
}
LAYER_MODULES = {
    "norm + projection": ("attn_norm", "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("mlp_norm", "gate_proj", "up_proj", "down_proj"),
}
OPERATIONS = {
    "rope_scatter_": "rope + scatter",
    "cached_attention": "attention",
    "choose_token": "head + choice",
    "choose_token_fused": "head + choice",
    "commit_": "commit",
}
GOALS = {"full": 1.15, "cached": 1.10}
# Of the line-up, the policy whose step half-way is of the kind.
STEPS = {"full": "plain", "cached": "decode, no refresh"}


def products(model: Any, batch: int, slots: int, active: int, rows: int) -> dict[str, Callable[[], None]]:
    """The matrix products of a step by part: `active` slots over `slots`, an output for `rows` of them."""
    spec, layers = model.spec, model.layers

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=model.device).to(model.dtype)

    # Of every active slot, and of those with an output, which are all that the last layer goes on with.
    counts, width = (active, rows), spec.num_heads * spec.head_dim
    wide, out, deep = (
        [noise(batch, n, size) for n in counts] for size in (spec.hidden_size, width, spec.intermediate_size)
    )
    heads, group = batch * spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
    query = [noise(heads, n * group, spec.head_dim) for n in counts]
    keys = noise(heads, spec.head_dim, slots)
    last = [i == len(layers) - 1 for i in range(len(layers))]

    def projections():
        for layer, end in zip(layers, last, strict=True):
            if isinstance(layer, PackedLayer):
                product(layer.qkv_proj, wide[0])
            else:
                product(layer.q_proj, wide[end])
                product(layer.k_proj, wide[0])
                product(layer.v_proj, wide[0])
            product(layer.o_proj, out[end])

    def attention():
        for end in last:
            torch.bmm(torch.bmm(query[end], keys), keys.transpose(1, 2))

    def mlp():
        for layer, end in zip(layers, last, strict=True):
            product(layer.gate_proj, wide[end])
            product(layer.up_proj, wide[end])
            product(layer.down_proj, deep[end])

    head = partial(product, model.head, wide[1].flatten(0, 1))
    return {"norm + projection": projections, "attention": attention, "MLP": mlp, "head + choice": head}


def seconds_of(parts: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Of each part, called once."""
    return {part: timed(call, device)[0] for part, call in parts.items()}


def product(module: nn.Module, x: Tensor) -> Any:
    """x through the weight of a linear layer, and nothing else."""
    if isinstance(module, PackedHead):
        return [product(part, x) for part in module.parts]
    if isinstance(module, PackedLinear):
        return torch.ops.mkldnn._linear_pointwise(x, module.packed, None, "none", [], "")
    return F.linear(x, module.weight)


@contextmanager
def recorded(model: Any) -> Iterator[Counter]:
    """Seconds by part of what runs inside the `with` block; a GPU is waited for before and after every part."""
    seconds: Counter[str] = Counter()

    def watched(call: Callable, part: str) -> Callable:
        def run(*args, **kwargs):
            synchronise(model.device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronise(model.device)
            seconds[part] += time.perf_counter() - start
            return result

        return run

    modules = [(model.embed, "embedding"), (model.norm, "head + choice")]
    if not hasattr(model.head, "strips"):  # else it is called by the choice, and counted there
        modules.append((model.head, "head + choice"))
    parts = [(name, part) for part, names in LAYER_MODULES.items() for name in names]
    modules += [(getattr(layer, name), part) for layer in model.layers for name, part in parts if hasattr(layer, name)]
    with ExitStack() as stack:
        for module, part in modules:
            stack.enter_context(patch.object(module, "forward", watched(module.forward, part)))
        for name, part in OPERATIONS.items():
            stack.enter_context(patch.object(kernels, name, watched(getattr(kernels, name), part)))
        stack.enter_context(patch.object(Sequences, "commit", watched(Sequences.commit, "commit")))
        yield seconds


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """A full and a cached step, half-way through a generation.

    Returns:
        {"rows": [{"kind", "slots", "active", "rows", "step_ms", "floor_ms", "ratio", "parts", "products"}, ...]}:
        medians in milliseconds; `parts` add up to a step that was timed part by part, `products` to the floor.
        `linear_floor_ms` is the floor by `nn.Linear`, where the model is packed and its twin is not.
    """
    with Bar(len(GOALS) * 4 * ROUNDS, "call") as bar:
        return {"rows": [_row(options, kind, bar) for kind in GOALS]}


def _row(options: Options, kind: str, bar: Bar) -> dict[str, Any]:
    model, half_way = options.model, HalfWay(options, of_lineup(STEPS[kind]).settings)
    device, size = model.device, half_way.engine.rows.size
    forward = half_way.take().forward
    half_way.back()
    active, rows = forward.positions.shape[1], forward.hidden.shape[1]
    floor = products(model, options.batch, size, active, rows)
    linear = products(options.eager, options.batch, size, active, rows) if options.eager not in (None, model) else {}
    seconds_of(floor | linear, device)

    def whole() -> float:
        seconds, _ = timed(half_way.take, device)
        half_way.back()
        return seconds

    def by_part() -> dict[str, float]:
        with recorded(model) as seconds:
            total, _ = timed(half_way.take, device)
        half_way.back()
        return {part: seconds[part] for part in PARTS} | {"Python": total - sum(seconds.values())}

    calls = {"products": partial(seconds_of, floor, device), "step": whole, "parts": by_part}
    calls["linear"] = partial(seconds_of, linear, device)
    found = in_turn(calls, ROUNDS, bar)
    ratios, against = (
        [step / (sum(alone.values()) or step) for step, alone in zip(found["step"], found[name], strict=True)]
        for name in ("products", "linear")
    )
    sizes = {"slots": size, "active": active, "rows": rows, "batch": options.batch}
    step = {"step_ms": statistics.median(found["step"]) * 1e3, "floor_ms": _median_sum(found["products"])}
    ratio = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    by_linear = {
        "linear_floor_ms": _median_sum(found["linear"]) if linear else None,
        "linear_ratio": statistics.median(against) if linear else None,
    }
    by = {name: _medians(found[name]) for name in ("parts", "products")}
    return {"kind": kind, **sizes, **step, **ratio, **by, **by_linear}


def _median_sum(rows: list[dict[str, float]]) -> float:
    return statistics.median(sum(row.values()) for row in rows) * 1e3


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """By part, in milliseconds."""
    return {part: statistics.median(row[part] for row in rows) * 1e3 for part in rows[0]}


def table(found: dict[str, Any]) -> str:
    """The parts beside their products, and what keeps a step from its goal."""
    return "\n\n".join(_table(row) for row in found["rows"])


def _table(row: dict[str, Any]) -> str:
    parts, alone, step, goal = row["parts"], row["products"], row["step_ms"], GOALS[row["kind"]]
    cells = [
        (part, f"{ms:.2f}", f"{alone[part]:.2f}" if part in alone else "", f"{ms / step:.1%}")
        for part, ms in parts.items()
    ]
    total = sum(parts.values())
    cells.append(("sum of the parts", f"{total:.2f}", f"{sum(alone.values()):.2f}", f"{total / step:.1%}"))
    cells.append(("step, not taken apart", f"{step:.2f}", f"{row['floor_ms']:.2f}", ""))
    verdict = "reached" if row["ratio"] <= goal else f"missed by {row['ratio'] - goal:.2f}"
    above = sorted(((ms - alone.get(part, 0.0), part) for part, ms in parts.items()), reverse=True)
    worst = [f"{part} {ms / row['floor_ms']:.1%} ({PARTS[part]})" for ms, part in above[:4] if ms > 0]
    lines = [
        f"{row['kind']} step, batch {row['batch']}: {row['active']} of {row['slots']} slots, {row['rows']} outputs",
        columns(("part", "ms", "products", "of step"), cells),
        f"step / floor: {row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}); goal {goal:.2f}: {verdict}",
        f"above the floor, as shares of it: {'; '.join(worst)}",
    ]
    if row["linear_ratio"] is not None:
        lines.append(
            f"the same products by nn.Linear, whose weights are not packed: {row['linear_floor_ms']:.2f} ms; "
            f"step / those: {row['linear_ratio']:.2f}"
        )
    return "\n".join(lines)
