"""The attention that slots get from packed queries: its inputs and ways."""

import torch
from torch import Tensor

from dkv import kernels
from dkv.bench.baselines import operations as eager
from dkv.bench.gpu.cases import Case, Inputs, Sizes, counts, heads, nbytes, tolerance


def mass(z: Sizes, device: torch.device) -> Case:
    """Of rows that have between half of the active slots, over half of the slots, and all of them.

    Eager makes the weights of all heads anew, as code that looks at attention does.
    """
    q, k, v = heads(z, device, z.active, z.slots, z.slots)
    (lengths, own), (stops, seen) = counts(z, device, z.active), counts(z, device, z.slots)
    rows = {"query_starts": lengths.cumsum(0) - lengths, "query_lengths": lengths, "most_queries": z.active}
    rows["key_ranges"] = torch.stack((torch.zeros_like(stops), stops), 1)
    q, work = q[own], kernels.Workspace()
    _, lse = kernels.cached_attention(q, k, v, return_lse=True, **rows)
    inputs: Inputs = {"q": q, "k_buf": k, "lse": lse, "weight": torch.rand(len(q)).to(device)} | rows

    def by_weights(x: Inputs) -> Tensor:
        query, weight = (y.new_zeros(*own.shape, *y.shape[1:]).index_put_((own,), y) for y in (x["q"], x["weight"]))
        shares = eager.weights(query, x["k_buf"], seen.unsqueeze(1)).mean(1, dtype=torch.float32)
        return (weight.unsqueeze(1) @ shares).squeeze(1)

    return Case(
        "attention_mass",
        {"B": z.batch, "N": z.active, "S": z.slots, "Hq": q.shape[1], "Hkv": k.shape[2], "D": q.shape[2]},
        inputs,
        lambda x: kernels.attention_mass(**x, workspace=work),
        tolerance(torch.float32, 0, sums=64),
        int(stops.sum()) * nbytes(k[0, 0]) + nbytes(q, lse, inputs["weight"]) + 4 * seen.numel(),
        2 * int((lengths * stops).sum()) * q[0].numel(),
        {"eager": by_weights},
        # Weights are rounded to the dtype before they are added up.
        eager_tolerance=tolerance(z.dtype, 6, sums=64),
    )
