"""The product with the LM head and the choice from it, as one operation."""

import torch

from dkv.bench import gpu_work
from dkv.bench.gpu_work import Sizes
from dkv.bench.ops.cases import OURS, Case, each, tolerance


def case(z: Sizes, device: torch.device) -> Case:
    work = gpu_work.choose_fused(z, device)
    hidden, weight = work.inputs["hidden"], work.inputs["weight"]
    # The published samplers do not forbid the mask: here it never wins.
    weight[z.spec.mask_token_id] = 0

    def answer(way, got):
        token, sure = got
        # Rounded to half precision, logits tie: a token is right if its exact logit is the best but for rounding.
        logit = (hidden.double() * weight[token].double()).sum(1, keepdim=True)
        return logit, (sure.log() if way == "eager" else sure).unsqueeze(1)

    size = {"R": len(hidden), "d": hidden.shape[1], "V": len(weight)}
    return Case(work, size, answer, tolerance(z.dtype, 2))


@each(("eager", *OURS))
def test_choose_token_fused(measure, step, way):
    measure("choose_token_fused", case, step, way)
