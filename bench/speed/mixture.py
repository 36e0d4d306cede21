"""A mixture layer on a CPU: as `dkv.load` has it, against the eager class of transformers and its products alone.

    python -m dkv.bench.speed.mixture --size 1024 --width 512

Both have the same weights and give the same output, which is checked first.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dkv.bench.report import columns
from dkv.bench.speed.floor import expert_products
from dkv.bench.timing import in_turn, timed
from dkv.models.mixture import Experts, Mixture
from dkv.models.packing import can_pack, packed_experts

ROUNDS = 15
# The least of eager time / time, and of the time of the products / time.
GOALS = {"eager": 1.5, "products": 0.8}


def eager_class(experts: Experts) -> nn.Module:
    """transformers' block of OLMoE, in its eager implementation, over the very same weights."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    mixture, size = experts.mixture, experts.router.weight.shape[1]
    config = OlmoeConfig(
        hidden_size=size,
        intermediate_size=mixture.width,
        num_experts=mixture.experts,
        num_experts_per_tok=mixture.chosen,
        norm_topk_prob=mixture.renormalise,
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        block = OlmoeSparseMoeBlock(config)
    block.gate.weight = experts.router.weight
    block.experts.gate_up_proj, block.experts.down_proj = experts.gate_up.weight, experts.down.weight
    return block.eval()


@torch.no_grad()
def measure(mixture: Mixture, size: int, tokens: int) -> dict[str, float]:
    """Medians in milliseconds of the contenders, who take turns, and the medians of their ratios to dkv's layer."""
    torch.manual_seed(0)
    plain, x = Experts(mixture, size), torch.randn(tokens, size)
    plain.requires_grad_(False)
    layer = packed_experts(plain) if can_pack() else plain
    eager = eager_class(plain)
    torch.testing.assert_close(eager(x[None])[0], layer(x), atol=1e-3, rtol=1e-3)
    products = expert_products(layer, x)
    calls = {"dkv": partial(layer, x), "products": lambda: [call() for call in products]}
    calls["eager"] = partial(eager, x[None])
    found = in_turn({name: partial(_seconds, call) for name, call in calls.items()}, ROUNDS)
    ratios = {
        name: statistics.median(other / ours for other, ours in zip(found[name], found["dkv"], strict=True))
        for name in GOALS
    }
    return {f"{name}_ms": statistics.median(each) * 1e3 for name, each in found.items()} | ratios


def table(found: dict[str, float]) -> str:
    """The times, and how they stand to the goals."""
    cells = [("dkv", f"{found['dkv_ms']:.2f}", "", "")]
    for name, goal in GOALS.items():
        cells.append((name, f"{found[f'{name}_ms']:.2f}", f"{found[name]:.2f}", f"{goal:.2f}"))
    return columns(("mixture layer", "ms", "/ dkv", "goal, at least"), cells)


def _seconds(call: Callable[[], Any]) -> float:
    return timed(call, torch.device("cpu"))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    settings = {"size": 1024, "width": 512, "experts": 64, "chosen": 8, "tokens": 32}
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    print(table(measure(Mixture(asked.experts, asked.chosen, asked.width), asked.size, asked.tokens)))


if __name__ == "__main__":
    main()
