"""Attention over the buffer in fast PyTorch: SDPA, or plain products where they are faster.

What is hidden is taken out before anything is multiplied, as 0 times NaN is NaN. Nothing here reads a value back
from a device other than the CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels import reference
from dkv.kernels.workspace import Workspace

# Scores that SDPA on a CPU compares one by one, which leaves NaN out, rather than as a vector.
LANES = 16
# Scores of all heads held at once by attention in plain products.
MOST_SCORES = 1 << 22


def cached_attention(
    q, k_buf, v_buf, *, query_lengths=None, key_ranges=None, key_mask=None, mask=None, block_ids=None, scale=None,
    return_lse=False, workspace=None,
):  # fmt: skip
    pairs = mask is not None or block_ids is not None
    only_lengths = not (pairs or key_mask is not None or return_lse)
    if only_lengths and q.device.type == "cpu" and not (query_lengths is None and key_ranges is None):
        return _row_by_row(q, k_buf, v_buf, query_lengths, key_ranges, scale, workspace)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = reference.visibility(q, k_buf, query_lengths, key_ranges, key_mask, mask, block_ids)
    if visible is None:
        return _attend(q, k_buf, v_buf, None, scale, return_lse, workspace)
    blind, unseen = ~visible.any(-1), ~visible.any(1)  # [B, N or 1], [B, S]
    q = q.masked_fill(blind[:, :, None, None], 0)
    key, value = (x.masked_fill(unseen[:, :, None, None], 0) for x in (k_buf, v_buf))
    # A query that sees nothing is given everything, so that its softmax has a gradient; its result is dropped.
    bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~(visible | blind.unsqueeze(-1)), -torch.inf)
    bias, strange = bias.unsqueeze(1), None
    if pairs:
        key, value, bias, strange = _told_apart(key, value, bias, visible)
    out = _attend(q, key, value, bias, scale, return_lse, workspace)
    out, lse = out if return_lse else (out, None)
    if strange is not None:
        out = out.masked_fill(strange.repeat_interleave(q.shape[2] // k_buf.shape[2], 2), torch.nan)
    out = out.masked_fill(blind[:, :, None, None], 0)
    return (out, lse.masked_fill(blind.unsqueeze(-1), -torch.inf)) if return_lse else out


def _told_apart(key: Tensor, value: Tensor, bias: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values that are finite, and who sees those that were not.

    Returns:
        key, value, the bias [B, Hkv, N, S] with NaN where a query sees a key that was not finite, and where a query
        sees a value that was not, bool [B, N, Hkv, D].
    """
    bad_key = ~torch.linalg.vector_norm(key.detach(), torch.inf, dim=-1).isfinite()  # [B, S, Hkv]
    bad_value = ~value.detach().isfinite()
    bias = bias.masked_fill(visible.unsqueeze(1) & bad_key.transpose(1, 2).unsqueeze(2), torch.nan)
    met = visible.to(value.dtype) @ bad_value.flatten(2).to(value.dtype)
    strange = (met > 0).unflatten(-1, bad_value.shape[2:])
    return key.masked_fill(bad_key.unsqueeze(-1), 0), value.masked_fill(bad_value, 0), bias, strange


def _attend(q, key, value, bias, scale, return_lse, workspace):
    """Attention with a bias on the scores, [B, Hkv or 1, N or 1, S] or None."""
    if return_lse:
        return _with_lse(q, key, value, bias, scale)
    (batch, n, heads, size), kv_heads = q.shape, key.shape[2]
    group = heads // kv_heads
    query = q.transpose(1, 2)
    if group > 1:
        # The query heads of a key head become rows: K and V are never repeated.
        query = q.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(batch, kv_heads, n * group, size)
        if bias is not None and bias.shape[2] > 1:
            bias = bias.repeat_interleave(group, 2)
    if bias is None and _few_queries(query, key, value):
        out = _by_products(query, key, value, scale, workspace)
    else:
        out = F.scaled_dot_product_attention(
            query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias, scale=scale
        )
    out = out.transpose(1, 2) if group == 1 else out.unflatten(2, (n, group)).transpose(1, 2).reshape(q.shape)
    if q.device.type == "cpu" and (q.element_size() < 4 or key.shape[1] < LANES):
        out = out + _unseen_by_sdpa(q, key)
    return out


def _unseen_by_sdpa(q: Tensor, key: Tensor) -> Tensor:
    """NaN for the queries [B, N, Hq, 1] whose scores are not finite, else 0.

    SDPA on a CPU gives 0 where all of a few scores are NaN, and in half precision where one is infinite.
    """
    of_queries, of_keys = (q.detach() * 0).sum(-1, keepdim=True), (key.detach() * 0).sum((1, 3))  # [B, Hkv]
    return of_queries + of_keys.repeat_interleave(q.shape[2] // key.shape[2], 1)[:, None, :, None]


def _with_lse(q, key, value, bias, scale) -> tuple[Tensor, Tensor]:
    key, value = reference.wide(key), reference.wide(value)
    query = reference.wide(q).unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("bnhgd,bshd->bhgns", query, key) * scale
    if bias is not None:
        scores = scores + bias.unsqueeze(2)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0))
    out = torch.einsum("bhgns,bshd->bnhgd", weights, value).flatten(2, 3).to(q.dtype)
    return out, lse.squeeze(-1).flatten(1, 2).transpose(1, 2)


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
    return torch.cat(rows) if rows else q.clone()


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
