"""Every operation of full and cached steps of both models, all ways of it in a row."""

import pytest
import torch

from dkv.bench.gpu.cases import OURS
from dkv.bench.ops.runner import cases

CASES = cases("cuda" if torch.cuda.is_available() else "cpu")
WAYS = {"attention": ("eager", "sdpa", "flex", *OURS)}
WAYS |= dict.fromkeys(("choose drawn", "choose_fused int8", "plan", "pack", "window", "advance"), OURS)


def ways(name: str) -> tuple[str, ...]:
    return next((given for start, given in WAYS.items() if name.startswith(start)), ("eager", *OURS))


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in CASES for way in ways(name)])
def test_operation(benchmark, runner, name, way):
    runner.measure(benchmark, name, CASES[name], way)
