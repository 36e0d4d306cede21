"""The operations in fast PyTorch: SDPA over the buffer, in-place writes, strips of the vocabulary.

Nothing here reads a value back to the host. Arguments are those of the public functions of
`dkv.kernels`, which check them and document their shapes; `dkv.kernels.reference` defines the results.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels import reference
from dkv.kernels.torch_choice import choose_token, choose_token_fused
from dkv.kernels.workspace import Workspace

__all__ = [
    "cached_attention",
    "choose_token",
    "choose_token_fused",
    "commit_",
    "gather_rows",
    "rope_scatter_",
    "scatter_rows_",
]


# Scores of all heads held at once by attention in plain products.
MOST_SCORES = 1 << 22


def cached_attention(
    q, k_buf, v_buf, *, query_lengths=None, key_ranges=None, key_mask=None, mask=None, block_ids=None, scale=None,
    return_lse=False, workspace=None,
):  # fmt: skip
    special = return_lse or key_mask is not None or mask is not None or block_ids is not None
    if not special and q.device.type == "cpu" and not (query_lengths is None and key_ranges is None):
        return _row_by_row(q, k_buf, v_buf, query_lengths, key_ranges, scale, workspace)
    if return_lse:
        return reference.cached_attention(
            q, k_buf, v_buf, query_lengths=query_lengths, key_ranges=key_ranges, key_mask=key_mask,
            mask=mask, block_ids=block_ids, scale=scale, return_lse=True,
        )  # fmt: skip
    batch, n, heads, size = q.shape
    kv_heads = k_buf.shape[2]
    group = heads // kv_heads
    query = q.transpose(1, 2)
    if group > 1:
        # The query heads of a key head become rows: K and V are never repeated.
        query = q.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(batch, kv_heads, n * group, size)
    visible = reference.visibility(q, k_buf, query_lengths, key_ranges, key_mask, mask, block_ids)
    mask = None
    if visible is not None:
        mask = visible.unsqueeze(1)
        if mask.shape[2] > 1 and group > 1:
            mask = mask.repeat_interleave(group, 2)
    if mask is None and _few_queries(query, k_buf, v_buf):
        out = _by_products(query, k_buf, v_buf, size**-0.5 if scale is None else scale, workspace)
    else:
        out = F.scaled_dot_product_attention(
            query, k_buf.transpose(1, 2), v_buf.transpose(1, 2), attn_mask=mask, scale=scale
        )
    out = out.transpose(1, 2) if group == 1 else out.unflatten(2, (n, group)).transpose(1, 2).reshape(q.shape)
    if visible is not None:
        out = out.masked_fill(~visible.any(-1)[:, :, None, None], 0)
    return out


def _row_by_row(q, k_buf, v_buf, query_lengths, key_ranges, scale, workspace) -> Tensor:
    """Rows of different lengths, each as it is alone: nothing is computed for what fills it up, and no mask is made."""
    lengths = [q.shape[1]] * len(q) if query_lengths is None else query_lengths.tolist()
    ranges = [(0, k_buf.shape[1])] * len(q) if key_ranges is None else key_ranges.tolist()
    rows = []
    for row, (length, (start, stop)) in enumerate(zip(lengths, ranges, strict=True)):
        some = (slice(row, row + 1), slice(max(start, 0), max(stop, 0)))
        query, key, value = q[row : row + 1, : max(length, 0)], k_buf[some], v_buf[some]
        if query.shape[1] and key.shape[1]:
            out = cached_attention(query, key, value, scale=scale, workspace=workspace)
            rows.append(F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - out.shape[1])))
        else:
            rows.append(torch.zeros_like(q[row : row + 1]))
    return torch.cat(rows)


def _few_queries(query: Tensor, k_buf: Tensor, v_buf: Tensor) -> bool:
    """Whether two plain products beat SDPA, which on a CPU cuts fewer than 192 queries into tiles of 32."""
    heads, rows = query.shape[1:3]
    plain = query.device.type == "cpu" and query.dtype == torch.float32
    fits = 32 < rows < 192 and heads * rows * k_buf.shape[1] <= MOST_SCORES
    return plain and fits and not any(x.requires_grad for x in (query, k_buf, v_buf))


def _by_products(query: Tensor, k_buf: Tensor, v_buf: Tensor, scale: float, workspace: Workspace | None) -> Tensor:
    """Attention of query [B, H, M, D] over [B, S, H, D] row by row, so that the scores stay in the cache."""
    work = Workspace() if workspace is None else workspace
    shape = (*query.shape[1:3], k_buf.shape[1])
    scores, out = work.take("scores", shape, query.dtype, query.device), query.new_empty(query.shape)
    for q, k, v, to in zip(query * scale, k_buf, v_buf, out, strict=True):
        torch.bmm(q, k.permute(1, 2, 0), out=scores)
        torch.bmm(torch.softmax(scores, -1, out=scores), v.transpose(0, 1), out=to)
    return out


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
