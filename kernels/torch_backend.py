"""The operations in fast PyTorch: SDPA over the buffer, in-place writes, strips of the vocabulary.

Nothing here reads a value back to the host. Arguments are those of the public functions of
`dkv.kernels`, which check them and document their shapes; `dkv.kernels.reference` defines the results.
"""

import torch
from torch import Tensor

from dkv.kernels import reference
from dkv.kernels.torch_attention import cached_attention
from dkv.kernels.torch_choice import choose_token, choose_token_fused

__all__ = [
    "cached_attention",
    "choose_token",
    "choose_token_fused",
    "commit_",
    "gather_rows",
    "rope_scatter_",
    "scatter_rows_",
]


def _write_rows(k_buf: Tensor, v_buf: Tensor, positions: Tensor, key: Tensor, value: Tensor, valid) -> None:
    batch = torch.arange(len(positions), device=positions.device).unsqueeze(1)
    for buffer, rows in ((k_buf, key), (v_buf, value)):
        rows, slots = rows.to(buffer.dtype), positions
        if valid is not None:
            # An entry that must not write repeats the first of its row; a row without any keeps the old.
            slots = torch.where(valid, positions, positions[:, :1])
            start = torch.where(valid[:, :1, None, None], rows[:, :1], buffer[batch, positions[:, :1]])
            rows = torch.where(valid[:, :, None, None], rows, start)
        buffer.index_put_((batch, slots), rows)


def rope_scatter_(
    q, k, v, cos, sin, positions, k_buf, v_buf, *, query_positions=None, lengths=None, q_bias=None, k_bias=None,
    v_bias=None, q_norm=None, k_norm=None,
):  # fmt: skip
    q, k, v = (x if bias is None else x + bias for x, bias in ((q, q_bias), (k, k_bias), (v, v_bias)))
    q, k = reference.head_norm(q, q_norm), reference.head_norm(k, k_norm)
    valid = None
    if lengths is not None:
        valid = torch.arange(positions.shape[1], device=positions.device) < lengths[:, None]
        positions = torch.where(valid, positions, 0)  # the others may hold anything
    tables = cos[positions], sin[positions]
    key = _rotate(k, *tables)
    if query_positions is not None:
        tables = cos[query_positions], sin[query_positions]
    query = _rotate(q, *tables)
    _write_rows(k_buf, v_buf, positions, key, v, valid)
    return query


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotate` without temporaries, where the dtypes agree and no gradient is asked for."""
    if x.dtype != cos.dtype or any(t.requires_grad for t in (x, cos, sin)):
        return reference.rotate(x, cos, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    (a, b), out = x.chunk(2, -1), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = out.chunk(2, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


def gather_rows(x, index):
    return x[torch.arange(len(index), device=index.device).unsqueeze(1), index]


def scatter_rows_(x, index, source):
    batch = torch.arange(len(index), device=index.device).unsqueeze(1)
    return x.index_put_((batch, index), source.to(x.dtype))


def commit_(canvas, token, log_confidence, eligible, count, *, positions=None, threshold=None):
    confidence = reference.ranked(log_confidence)
    # Clamped, so that an eligible slot of confidence -inf still comes before one that is not eligible.
    score = confidence.clamp(min=torch.finfo(confidence.dtype).min).masked_fill(~eligible, -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(order.shape[1], device=order.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    chosen = rank < count[:, None]
    if threshold is not None:
        chosen = chosen | (confidence >= threshold)
    committed = chosen & eligible
    if positions is None:
        canvas.copy_(torch.where(committed, token, canvas))
    else:
        # Added, as an entry that is not committed may name the slot of one that is.
        canvas.scatter_add_(1, positions, (token - canvas.gather(1, positions)).masked_fill_(~committed, 0))
    return committed
