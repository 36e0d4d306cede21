"""Attention of the active queries over the whole buffer.

Fresh keys and values are in their slots already: bringing them there is part of rope_scatter.
"""

import torch

from dkv.bench import gpu_baselines, gpu_work
from dkv.bench.gpu_work import Sizes
from dkv.bench.ops.cases import OURS, Case, each, tolerance


def case(z: Sizes, device: torch.device) -> Case:
    work = gpu_work.attention(z, device)
    q, k, v = (work.inputs[name] for name in ("q", "k", "v"))
    # A mask of the padding, which hides nothing here, is added all the same.
    visible = torch.ones(z.batch, 1, z.slots, dtype=torch.bool, device=device)
    return Case(
        work,
        {"B": z.batch, "N": z.active, "S": z.slots, "Hq": q.shape[2], "Hkv": k.shape[2], "D": q.shape[3]},
        answer=lambda way, out: (out.transpose(1, 2) if way in ("sdpa", "flex") else out,),
        tolerance=tolerance(z.dtype, 2),
        eager=lambda: gpu_baselines.attention(q, k, v, visible),
        # Scores, up to about 5, are rounded twice, which their exponentials multiply.
        eager_tolerance=tolerance(z.dtype, 6),
    )


@each(("eager", "sdpa", "flex", *OURS))
def test_cached_attention(measure, step, way):
    measure("cached_attention", case, step, way)
