"""A step against its floor: the matrix products that it cannot do without, timed by themselves in turn with it.

Where the weights are packed the products of the floor are packed too, so that it is as low as this machine and
this build of PyTorch let it be; everything else that a step does is what the ratio is above 1.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.report import columns
from dkv.bench.steps import HalfWay
from dkv.bench.timing import in_turn, timed
from dkv.common.bar import Bar
from dkv.kernels.common.operation import Operation
from dkv.models.layers import RMSNorm
from dkv.models.mixture import Experts
from dkv.models.packed import PackedGates, PackedLinear
from dkv.models.packing import PackedHead

ROUNDS = 25
# What a step is divided into, which modules and operations belong to a part, and why it exceeds its products.
PARTS = {
    "embedding": "no product in it",
    "norm + projection": "the norms, which read and write the states of every active slot once more",
    "rope + scatter": "no product in it: rotation, and the writes into the buffer",
    "attention": "the softmax between its two products",
    "MLP": "the norm; of a mixture also the choice of experts, and the order of tokens by expert",
    "head + choice": "the largest logit, and the sum of all exponentials",
    "commit": "no product in it",
    "Python": "the policy, the counts, and the calls between the parts",
}
LAYER_MODULES = {
    "norm + projection": ("attn_norm", "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("mlp_norm", "gates", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "experts"),
}
OPERATIONS = {
    "rope_scatter_": "rope + scatter",
    "cached_attention": "attention",
    "choose_token": "head + choice",
    "choose_token_fused": "head + choice",
    "advance_": "commit",
}
GOALS = {"full": 1.15, "cached": 1.10}
# Of the line-up, the policy whose step half-way is of the kind.
STEPS = {"full": "plain", "cached": "decode, no refresh"}


def products(model: Any, half_way: HalfWay) -> dict[str, Callable[[], Any]]:
    """The matrix products of a step by part: those of the entries that go through each layer, by random numbers.

    Args:
        model: whose weights are multiplied; that of the step, or the same in another layout.
        half_way: before the step, which is taken to see what goes through the layers.
    """
    spec, batch, sizes = model.spec, len(half_way.engine.rows.tokens), half_way.sizes()
    entries, outputs = half_way.entries()

    @functools.cache
    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=model.device).to(model.dtype)

    heads, group = batch * spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
    keys = noise(heads, spec.head_dim, sizes["slots"])
    calls: dict[str, list[Callable[[], Any]]] = {name: [] for name in ("norm + projection", "attention", "MLP")}
    mixtures = [layer.experts for layer in model.layers if layer.experts is not None]
    # Which experts are chosen, and by how many, is that of the step.
    for experts, x in zip(mixtures, half_way.inputs(mixtures), strict=True):
        calls["MLP"] += expert_products(experts, x)
    for layer, through in zip(model.layers, entries, strict=True):
        whole, rest = noise(through.entering, spec.hidden_size), noise(through.leaving, spec.hidden_size)
        inputs = {"qkv_proj": whole, "k_proj": whole, "v_proj": whole}
        inputs |= {"q_proj": noise(through.asking, spec.hidden_size)}
        inputs |= dict.fromkeys(("gates", "gate_proj", "up_proj", "gate_up_proj"), rest)
        inputs |= {"o_proj": noise(through.leaving, spec.num_heads * spec.head_dim)}
        inputs |= {"down_proj": noise(through.leaving, spec.intermediate_size)}
        for part, names in LAYER_MODULES.items():
            linears = [
                (getattr(layer, name), inputs[name])
                for name in names
                if name in inputs and getattr(layer, name, None) is not None
            ]
            calls[part] += [partial(product, *linear) for linear in linears]
        query = noise(heads, through.queries * group, spec.head_dim)
        calls["attention"].append(partial(lambda q: (q @ keys) @ keys.transpose(1, 2), query))
    calls["head + choice"] = [partial(product, model.head, noise(outputs, spec.hidden_size))]
    return {part: partial(lambda every: [call() for call in every], every) for part, every in calls.items()}


def product(module: nn.Module, x: Tensor) -> Any:
    """x through the weight of a linear layer, and nothing else."""
    if isinstance(module, PackedHead):
        return [product(part, x) for part in module.parts]
    if isinstance(module, PackedGates):
        return [product(part, x) for part in module.children()]
    if isinstance(module, PackedLinear):
        return torch.ops.mkldnn._linear_pointwise(x, module.packed, None, "none", [], "")
    return F.linear(x, module.weight)


def expert_products(experts: Experts, x: Tensor) -> list[Callable[[], Any]]:
    """The matrix products of a mixture over x [T, d]: those of router and shared expert, and of each chosen one."""
    mixture, chosen = experts.mixture, experts.router(x)[1].flatten()
    counts = chosen.bincount(minlength=mixture.experts).tolist()
    entries, hidden = x.repeat_interleave(mixture.chosen, 0), x.new_ones(len(chosen), mixture.width)
    calls = [partial(torch.mm, x, experts.router.weight.T)]
    for bank, inputs in ((experts.gate_up, entries), (experts.down, hidden)):
        packed = hasattr(bank, "parts")
        for weight, part in zip(bank.parts if packed else bank.weight, inputs.split(counts), strict=True):
            if len(part):
                calls.append(partial(product if packed else F.linear, *((weight, part) if packed else (part, weight))))
    if experts.shared is not None:
        wide = x.new_ones(len(x), mixture.shared_width)
        for name, inputs in {"gates": x, "gate_proj": x, "up_proj": x, "down_proj": wide}.items():
            if hasattr(experts.shared, name):
                calls.append(partial(product, getattr(experts.shared, name), inputs))
    return calls


def seconds_of(parts: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Of each part, called once."""
    return {part: timed(call, device)[0] for part, call in parts.items()}


@contextmanager
def recorded(model: Any) -> Iterator[Counter]:
    """Seconds by part of what runs inside the `with` block; a GPU is waited for before and after every part.

    The hooks of the engine see whole steps. Hence modules and operations are wrapped for as long as the block lasts.
    """
    seconds: Counter[str] = Counter()

    def watch(owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)
        stack.enter_context(patch.object(owner, name, partial(run, part, call)))

    inside: list[str] = []

    def run(part: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # What is called within a part is counted with it.
        if inside:
            return call(*args, **kwargs)
        inside.append(part)
        taken, result = timed(partial(call, *args, **kwargs), model.device)
        inside.pop()
        seconds[part] += taken
        return result

    call_operation = Operation.__call__

    def operation(self: Operation, *args: Any, **kwargs: Any) -> Any:
        call = partial(call_operation, self, *args, **kwargs)
        return run(OPERATIONS[self.name], call) if self.name in OPERATIONS else call()

    with ExitStack() as stack:
        watch(model.embed, "forward", "embedding")
        for name in ("forward", "added"):
            watch(model.norm, name, "head + choice")
        if not hasattr(model.head, "strips"):  # else it is called by the choice, and counted there
            watch(model.head, "forward", "head + choice")
        for part, names in LAYER_MODULES.items():
            for module in (getattr(layer, name, None) for layer in model.layers for name in names):
                if module is not None:
                    watch(module, "forward", part)
                if isinstance(module, RMSNorm):
                    watch(module, "added", part)
        stack.enter_context(patch.object(Operation, "__call__", operation))
        yield seconds


def by_part(model: Any, half_way: HalfWay) -> dict[str, float]:
    """Seconds of a step, which is taken and taken back, by part."""
    with recorded(model) as seconds:
        total = half_way.seconds()
    return {part: seconds[part] for part in PARTS} | {"Python": total - sum(seconds.values())}


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
    device, sizes = model.device, half_way.sizes()
    floor = products(model, half_way)
    linear = products(options.eager, half_way) if options.eager not in (None, model) else {}

    calls = {"products": partial(seconds_of, floor, device), "step": half_way.seconds}
    calls["parts"] = partial(by_part, model, half_way)
    calls["linear"] = partial(seconds_of, linear, device)
    calls["products"](), calls["linear"]()
    found = in_turn(calls, ROUNDS, bar)
    sums = {name: [sum(alone.values()) for alone in found[name]] for name in ("products", "linear")}
    ratios = [step / alone for step, alone in zip(found["step"], sums["products"], strict=True)]
    row = {"kind": kind, **sizes, "batch": options.batch, "step_ms": statistics.median(found["step"]) * 1e3}
    row |= {"floor_ms": statistics.median(sums["products"]) * 1e3, "ratio": statistics.median(ratios)}
    row |= {"lowest": min(ratios), "highest": max(ratios)}
    for name in ("parts", "products"):
        row[name] = {part: statistics.median(one[part] for one in found[name]) * 1e3 for part in found[name][0]}
    if not linear:
        return row | {"linear_floor_ms": None, "linear_ratio": None}
    against = [step / alone for step, alone in zip(found["step"], sums["linear"], strict=True)]
    slower = {"linear_floor_ms": statistics.median(sums["linear"]) * 1e3, "linear_ratio": statistics.median(against)}
    return row | slower


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
        linear = f"{row['linear_floor_ms']:.2f} ms; step / those: {row['linear_ratio']:.2f}"
        lines.append(f"the same products by nn.Linear, whose weights are not packed: {linear}")
    return "\n".join(lines)
