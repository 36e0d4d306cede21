"""A step against its floor: the matrix products that it cannot do without, timed by themselves in turn with it.

Where the weights are packed the products of the floor are packed too, so that it is as low as this machine and
this build of PyTorch let it be; everything else that a step does is what the ratio is above 1.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dkv
from dkv import kernels
from dkv.bench.options import Options
from dkv.canvas import Canvas
from dkv.models.packing import PackedLayer, PackedLinear
from dkv.randomness import Randomness
from dkv.sampler import Sampler
from dkv.schedule import Step

ROUNDS = 25
# What a step is divided into, which modules and operations belong to a part, and why it exceeds its products.
PARTS = {
    "embedding": "no product in it",
    "norm + projection": "the norms, which read and write every active row once more",
    "rope + scatter": "no product in it: rotation, and the writes into the buffer",
    "attention": "the softmax between its two products",
    "MLP": "the norm",
    "head + choice": "the largest logit, and the sum of all exponentials",
    "commit": "no product in it",
    "Python": "the policy, the counts, and the calls between the parts",
}
ROW_MODULES = {
    "norm + projection": ("attn_norm", "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("mlp_norm", "gate_proj", "up_proj", "down_proj"),
}
OPERATIONS = {
    "rope_scatter_": "rope + scatter", "cached_attention": "attention", "gather_rows": "head + choice",
    "choose_token": "head + choice", "choose_token_fused": "head + choice", "commit_": "commit",
}  # fmt: skip
GOALS = {"full": 1.15, "cached": 1.10}


class HalfDone:
    """A generation with half of its slots filled, whose next step can be taken again and again.

    Args:
        options: the model, and how long the canvas is.
        policy: "cached" steps are those of `dkv.Decode` between two refreshes.
    """

    def __init__(self, options: Options, kind: str):
        model, ids = options.model, options.prompts()
        self.model, self.kind = model, kind
        cache = dkv.NoCache() if kind == "full" else dkv.Decode(refresh=None, warmup=1)
        config = dkv.DiffusionConfig(max_new_tokens=options.new, cache=cache, schedule="blocks")
        mask_id = model.spec.mask_token_id
        canvas = Canvas(ids, torch.ones_like(ids, dtype=torch.bool), options.new, mask_id)
        self.sampler = Sampler(model, canvas, config, Randomness(0, canvas, None), mask_id)
        half = max(options.new // 2, 1)
        self.take(Step(0, 0, 0, 0, options.new, half))
        # The second of two steps: the first one has decoded many slots at once, which are fresh in it.
        self.take(Step(1, 0, 1, 0, options.new, 1))
        self.state = self._state()
        self.step = Step(2, 0, 2, 0, options.new, 1)

    def take(self, step: Step) -> Any:
        return self.sampler.run(step)

    def _state(self) -> tuple[Any, ...]:
        s, c = self.sampler, self.sampler.canvas
        return c.tokens.clone(), c.masked, c.fresh, s.masked_count, s.open_count, s.fresh_count

    def again(self) -> Any:
        """Take the step and go back to before it; what went through the model."""
        s, c = self.sampler, self.sampler.canvas
        done = self.take(self.step)
        tokens, c.masked, c.fresh, s.masked_count, s.open_count, s.fresh_count = self.state
        c.tokens.copy_(tokens)
        return done


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

    return {
        "norm + projection": projections, "attention": attention, "MLP": mlp,
        "head + choice": lambda: product(model.head, wide[1].flatten(0, 1)),
    }  # fmt: skip


def product(module: nn.Module, x: Tensor) -> Tensor:
    """x through the weight of a linear layer, and nothing else."""
    if isinstance(module, PackedLinear):
        return torch.ops.mkldnn._linear_pointwise(x, module.packed, None, "none", [], "")
    return F.linear(x, module.weight)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def recorded(model: Any) -> Iterator[Counter]:
    """Seconds by part of what runs inside the `with` block; a GPU is waited for before and after every part."""
    seconds: Counter[str] = Counter()

    def timed(call: Callable, part: str) -> Callable:
        def run(*args, **kwargs):
            settle(model.device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            settle(model.device)
            seconds[part] += time.perf_counter() - start
            return result

        return run

    modules = [(model.embed, "embedding"), (model.norm, "head + choice"), (model.head, "head + choice")]
    modules += [
        (getattr(layer, name), part)
        for layer in model.layers for part, names in ROW_MODULES.items() for name in names if hasattr(layer, name)
    ]  # fmt: skip
    with ExitStack() as stack:
        for module, part in modules:
            stack.enter_context(patch.object(module, "forward", timed(module.forward, part)))
        for name, part in OPERATIONS.items():
            stack.enter_context(patch.object(kernels, name, timed(getattr(kernels, name), part)))
        stack.enter_context(patch.object(Canvas, "commit", timed(Canvas.commit, "commit")))
        yield seconds


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    """A full and a cached step, half-way through a generation.

    Returns:
        {"rows": [{"kind", "slots", "active", "rows", "step_ms", "floor_ms", "ratio", "parts", "products"}, ...]}:
        medians in milliseconds; `parts` add up to a step that was timed part by part, `products` to the floor.
    """
    with tqdm(total=len(GOALS) * ROUNDS, unit="round", leave=False, disable=None) as bar:
        return {"rows": [_row(options, kind, bar) for kind in GOALS]}


def _row(options: Options, kind: str, bar: tqdm) -> dict[str, Any]:
    model, half_done = options.model, HalfDone(options, kind)
    done = half_done.again()
    size = half_done.sampler.canvas.size
    active, rows = done.positions.shape[1], done.hidden.shape[1]
    floor = products(model, options.batch, size, active, rows)
    for call in floor.values():
        call()
    whole, ratios, by_product, by_part = [], [], [], []
    for _ in range(ROUNDS):
        alone = {part: _seconds(call, model.device) for part, call in floor.items()}
        step = _seconds(half_done.again, model.device)
        with recorded(model) as seconds:
            total = _seconds(half_done.again, model.device)
        whole.append(step)
        ratios.append(step / sum(alone.values()))
        by_product.append(alone)
        by_part.append({part: seconds[part] for part in PARTS} | {"Python": total - sum(seconds.values())})
        bar.update()
    typical = statistics.median(ratios)
    return {
        "kind": kind, "slots": size, "active": active, "rows": rows, "batch": options.batch,
        "step_ms": statistics.median(whole) * 1e3,
        "floor_ms": statistics.median(sum(alone.values()) for alone in by_product) * 1e3,
        "ratio": typical, "lowest": min(ratios), "highest": max(ratios),
        "parts": _medians(by_part), "products": _medians(by_product),
    }  # fmt: skip


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    settle(device)
    start = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - start


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """By part, in milliseconds."""
    return {part: statistics.median(row[part] for row in rows) * 1e3 for part in rows[0]}


def table(found: dict[str, Any]) -> str:
    """The parts beside their products, and what keeps a step from its goal."""
    lines = []
    for row in found["rows"]:
        parts, alone, goal = row["parts"], row["products"], GOALS[row["kind"]]
        lines.append(
            f"{row['kind']} step, batch {row['batch']}: {row['active']} of {row['slots']} slots, {row['rows']} outputs"
        )
        lines.append(f"  {'part':18} {'ms':>8} {'products':>9} {'above':>8} {'of step':>8}")
        for part, ms in parts.items():
            above = ms - alone.get(part, 0.0)
            lines.append(f"  {part:18} {ms:8.2f} {alone.get(part, 0.0):9.2f} {above:8.2f} {ms / row['step_ms']:8.1%}")
        total = sum(parts.values())
        lines.append(f"  {'sum of the parts':18} {total:8.2f} {sum(alone.values()):9.2f} {'':8} "
                     f"{total / row['step_ms']:8.1%}")  # fmt: skip
        lines.append(f"  {'step':18} {row['step_ms']:8.2f} {row['floor_ms']:9.2f}")
        verdict = "reached" if row["ratio"] <= goal else f"missed by {row['ratio'] - goal:.2f}"
        lines.append(
            f"  step / floor {row['ratio']:.3f} ({row['lowest']:.2f} to {row['highest']:.2f}); "
            f"goal {goal:.2f}: {verdict}"
        )
        above = sorted(((ms - alone.get(part, 0.0), part) for part, ms in parts.items()), reverse=True)
        worst = [
            f"{part} {ms / row['floor_ms']:.1%} ({PARTS[part]})" for ms, part in above[:4] if ms > 0 and PARTS[part]
        ]
        lines += ["  above the floor, as shares of it: " + "; ".join(worst), ""]
    return "\n".join(lines).rstrip()
