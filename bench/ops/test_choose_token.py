"""The most probable token of every row of logits, and how probable it is."""

import torch

from dkv.bench import gpu_work
from dkv.bench.gpu_work import Sizes
from dkv.bench.ops.cases import OURS, Case, each, tolerance


def case(z: Sizes, device: torch.device) -> Case:
    work = gpu_work.choose(z, device)
    logits = work.inputs["logits"]
    # The published samplers do not forbid the mask: here it never wins.
    logits[:, z.spec.mask_token_id] = 0

    def answer(way, got):
        token, sure = got
        return logits.gather(1, token.unsqueeze(1)), (sure.log() if way == "eager" else sure).unsqueeze(1)

    return Case(
        work, {"R": len(logits), "V": logits.shape[1]}, answer, tolerance(z.dtype, 0),
        # Dream's softmax rounds to the dtype of the logits.
        eager_tolerance=tolerance(z.dtype, 2) if z.spec.family == "dream" else None,
    )  # fmt: skip


@each(("eager", *OURS))
def test_choose_token(measure, step, way):
    measure("choose_token", case, step, way)
