"""Head norms, rotation and the write into the buffer in fast PyTorch, without reading a value back to the host."""

import torch
from torch import Tensor

from dkv.kernels.rope_scatter.reference import head_norm, rotate


def rope_scatter_(q, k, v, cos, sin, positions, k_buf, v_buf, rows, query_positions, q_norm, k_norm):
    tables = cos[positions], sin[positions]
    key = _rotate(head_norm(k, k_norm), *tables)
    if query_positions is not None:
        tables = cos[query_positions], sin[query_positions]
    query = _rotate(head_norm(q, q_norm), *tables)
    if rows is None:
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)
    for buffer, entries in ((k_buf, key), (v_buf, v)):
        buffer.put_((rows, positions), entries)
    return query


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` without temporaries, where the dtypes agree and no gradient is asked for."""
    if x.dtype != cos.dtype or any(t.requires_grad for t in (x, cos, sin)):
        return rotate(x, cos, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    (a, b, rest), (left, right, kept) = x.split(sizes, -1), out.split(sizes, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    if sizes[-1]:
        kept.copy_(rest)
    return out
