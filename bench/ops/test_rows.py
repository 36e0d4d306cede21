"""Rows of hidden states between canvas order and active order; full steps move none."""

import torch

from dkv.bench import gpu_work
from dkv.bench.gpu_work import Sizes
from dkv.bench.ops.cases import CACHED_STEPS, OURS, Case, each


def _sizes(z: Sizes) -> dict[str, int]:
    return {"B": z.batch, "N": z.active, "S": z.slots, "d": z.spec.hidden_size}


def gather(z: Sizes, device: torch.device) -> Case:
    return Case(gpu_work.gather(z, device), _sizes(z), answer=lambda way, out: (out,))


def scatter(z: Sizes, device: torch.device) -> Case:
    work = gpu_work.scatter(z, device)
    return Case(work, _sizes(z), answer=lambda way, out: (work.inputs["x"],), in_place=("x",))


@each(("eager", *OURS), CACHED_STEPS)
def test_gather_rows(measure, step, way):
    measure("gather_rows", gather, step, way)


@each(("eager", *OURS), CACHED_STEPS)
def test_scatter_rows(measure, step, way):
    measure("scatter_rows_", scatter, step, way)
