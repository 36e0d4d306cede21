"""The most confident token of every row goes into the canvas."""

import torch

from dkv.bench import gpu_work
from dkv.bench.gpu_work import Sizes
from dkv.bench.ops.cases import OURS, Case, each


def case(z: Sizes, device: torch.device) -> Case:
    work = gpu_work.commit(z, device)
    return Case(
        work, {"B": z.batch, "N": z.active, "S": z.slots},
        answer=lambda way, committed: (committed, work.inputs["canvas"]), in_place=("canvas",),
    )  # fmt: skip


@each(("eager", *OURS))
def test_commit(measure, step, way):
    measure("commit_", case, step, way)
