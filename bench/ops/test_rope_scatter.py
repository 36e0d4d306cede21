"""Rotation of queries and keys, and the keys and values of the active slots among all others.

dkv writes the active slots into a buffer of rotated keys. The published code keeps keys unrotated: it joins
the fresh and the kept ones in every layer, brings them in order, and rotates all. In a full step there is nothing
to join: eager rotates, and writes by index.
"""

import torch

from dkv.bench import gpu_baselines, gpu_work
from dkv.bench.gpu_work import Sizes
from dkv.bench.ops.cases import OURS, Case, each, tolerance


def case(z: Sizes, device: torch.device) -> Case:
    work = gpu_work.rope_scatter(z, device)
    q, k, v, cos, sin, positions, k_buf, v_buf = work.inputs.values()
    idle = torch.ones(z.batch, z.slots, dtype=torch.bool, device=device).scatter_(1, positions, False)
    kept = idle.nonzero()[:, 1].view(z.batch, -1)
    kept_k, kept_v = (torch.randn(*kept.shape, *k.shape[2:], device=device, dtype=z.dtype) for _ in range(2))
    row = torch.arange(z.batch, device=device).unsqueeze(1)
    k_buf[row, kept], v_buf[row, kept] = gpu_baselines.rotate(kept_k, cos[kept], sin[kept]), kept_v
    order = torch.cat((positions, kept), 1).argsort(1)

    joined = lambda: gpu_baselines.rope_cat(q, k, v, cos, sin, positions, kept_k, kept_v, order)  # noqa: E731
    return Case(
        work,
        {"B": z.batch, "N": z.active, "S": z.slots, "Hq": q.shape[2], "Hkv": k.shape[2], "D": q.shape[3]},
        answer=lambda way, got: got if isinstance(got, tuple) else (got, k_buf, v_buf),
        tolerance=tolerance(z.dtype, 2),
        eager=joined if kept.numel() else None,
        in_place=("k_buf", "v_buf"),
    )


@each(("eager", *OURS))
def test_rope_scatter(measure, step, way):
    measure("rope_scatter_", case, step, way)
