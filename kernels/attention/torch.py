"""Attention over the buffer in fast PyTorch: SDPA, or plain products where they are faster.

What is hidden is set to 0 before anything is multiplied, as 0 times NaN is NaN. Nothing here reads a value back
from a device other than the CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels.attention.reference import Rules
from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.operation import recorded
from dkv.kernels.common.workspace import Workspace

# SDPA on a CPU takes the maximum of fewer scores than this one by one, in a way that skips NaN.
LANES = 16
# Rows of queries for which two plain products are taken to beat SDPA on a CPU, which cuts fewer than 192 of them into
# tiles of 32 (ATen's FlashAttentionKernel.cpp). No measurement of the two bounds has been kept.
PRODUCTS = range(33, 192)
# The most scores of all heads at once, 16 MiB, so that they stay near the CPU. Not timed.
MOST_SCORES = 1 << 22


def cached_attention(
    q: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    rules: Rules,
    most_queries: int,
    scale: float,
    return_lse: bool,
    *,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`dkv.kernels.cached_attention`: the output, and the log-sum-exp where it is asked for."""
    by_length = rules.query_lengths is not None or rules.key_ranges is not None
    if by_length and not (rules.of_pairs or rules.key_mask is not None or return_lse) and _readable(q):
        return _each_row_alone(q, k_buf, v_buf, rules, scale, workspace), None
    if rules.query_starts is not None:
        return _side_by_side(q, k_buf, v_buf, rules, most_queries, scale, return_lse, workspace)
    visible = rules.visible(q.shape[1], k_buf.shape[1])
    if visible is None:
        return _attend(q, k_buf, v_buf, None, scale, return_lse, workspace)
    blind, unseen = ~visible.any(-1), ~visible.any(1)  # [B, N or 1], [B, S]
    q = q.masked_fill(blind[:, :, None, None], 0)
    key, value = (x.masked_fill(unseen[:, :, None, None], 0) for x in (k_buf, v_buf))
    # A query that sees nothing is given everything, so that its softmax has a gradient; its result is dropped.
    bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~(visible | blind.unsqueeze(-1)), -torch.inf)
    bias, strange = bias.unsqueeze(1), None
    if rules.of_pairs:
        key, value, bias, strange = _finite(key, value, bias, visible)
    out, lse = _attend(q, key, value, bias, scale, return_lse, workspace)
    if strange is not None:
        out = out.masked_fill(strange.repeat_interleave(q.shape[2] // k_buf.shape[2], 2), torch.nan)
    out = out.masked_fill(blind[:, :, None, None], 0)
    return out, lse.masked_fill(blind.unsqueeze(-1), -torch.inf) if return_lse else None


def _finite(key: Tensor, value: Tensor, bias: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key and value made finite; the bias [B, Hkv, N, S] is NaN, and the mask [B, N, Hkv, D] set, where a query saw
    a key, or a value, that was not."""
    bad_key = ~torch.linalg.vector_norm(key.detach(), torch.inf, dim=-1).isfinite()  # [B, S, Hkv]
    bad_value = ~value.detach().isfinite()
    bias = bias.masked_fill(visible.unsqueeze(1) & bad_key.transpose(1, 2).unsqueeze(2), torch.nan)
    met = visible.to(value.dtype) @ bad_value.flatten(2).to(value.dtype)
    strange = (met > 0).unflatten(-1, bad_value.shape[2:])
    return key.masked_fill(bad_key.unsqueeze(-1), 0), value.masked_fill(bad_value, 0), bias, strange


def _attend(q, key, value, bias, scale, return_lse, workspace) -> tuple[Tensor, Tensor | None]:
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
    return out, None


def _unseen_by_sdpa(q: Tensor, key: Tensor) -> Tensor:
    """NaN for the queries [B, N, Hq, 1] whose scores are not finite, else 0.

    SDPA on a CPU gives 0 where all of a few scores are NaN, and in half precision where one is infinite.
    """
    of_queries, of_keys = (q.detach() * 0).sum(-1, keepdim=True), (key.detach() * 0).sum((1, 3))  # [B, Hkv]
    return of_queries + of_keys.repeat_interleave(q.shape[2] // key.shape[2], 1)[:, None, :, None]


def _with_lse(q, key, value, bias, scale) -> tuple[Tensor, Tensor]:
    key, value = wide(key), wide(value)
    query = wide(q).unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("bnhgd,bshd->bhgns", query, key) * scale
    if bias is not None:
        scores = scores + bias.unsqueeze(2)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0))
    out = torch.einsum("bhgns,bshd->bnhgd", weights, value).flatten(2, 3).to(q.dtype)
    return out, lse.squeeze(-1).flatten(1, 2).transpose(1, 2)


def _readable(q: Tensor) -> bool:
    """Whether the lengths of rows cost nothing to read."""
    return q.device.type == "cpu" and not recorded(q)


def _each_row_alone(q, k_buf, v_buf, rules: Rules, scale, workspace) -> Tensor:
    """Attention where rows differ in length alone: each over its own slots, without padding and without a mask."""
    batch, slots = k_buf.shape[:2]
    if rules.query_starts is not None:
        packed, starts, lengths = q, rules.query_starts.tolist(), rules.query_lengths.tolist()
    else:
        packed, width = q.flatten(0, 1), q.shape[1]
        starts = [row * width for row in range(batch)]
        lengths = [width] * batch if rules.query_lengths is None else rules.query_lengths.clamp(max=width).tolist()
    alike = lengths[:1] * batch == lengths and [row * lengths[0] for row in range(batch)] == starts
    if rules.key_ranges is None and alike and batch and slots and batch * lengths[0] == len(packed) > 0:
        rows = packed.view(batch, -1, *packed.shape[1:])
        return _attend(rows, k_buf, v_buf, None, scale, False, workspace)[0].reshape(q.shape)
    ranges = [(0, slots)] * batch if rules.key_ranges is None else rules.key_ranges.tolist()
    parts = []
    for row, (start, length, (first, stop)) in enumerate(zip(starts, lengths, ranges, strict=True)):
        own, here = slice(start, start + max(length, 0)), (slice(row, row + 1), slice(max(first, 0), max(stop, 0)))
        query, key, value = packed[own].unsqueeze(0), k_buf[here], v_buf[here]
        if query.shape[1] and key.shape[1]:
            parts.append((own, _attend(query, key, value, None, scale, False, workspace)[0][0]))
    if not parts:
        return q.masked_fill(torch.ones((), dtype=torch.bool), 0)
    if len(parts[0][1]) == len(packed):
        return parts[0][1].reshape(q.shape)
    out = torch.zeros_like(packed)
    for own, part in parts:
        out[own] = part
    return out.view(q.shape)


def _side_by_side(
    q, k_buf, v_buf, rules: Rules, most_queries, scale, return_lse, workspace
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed queries, which are brought to [B, most_queries, Hq, D] and back."""
    column = torch.arange(most_queries, device=q.device)
    own = column < rules.query_lengths.unsqueeze(1)
    entry = rules.query_starts.unsqueeze(1) + column  # [B, most_queries], of T
    rules, query = rules._replace(query_starts=None), q[entry.where(own, 0)]
    found = cached_attention(query, k_buf, v_buf, rules, most_queries, scale, return_lse, workspace=workspace)
    # What is of no row is written behind the last entry.
    to = entry.where(own, len(q))
    out, lse = (x if x is None else x.new_zeros(len(q) + 1, *x.shape[2:]).index_put_((to,), x)[:-1] for x in found)
    return out, lse


def _few_queries(query: Tensor, k_buf: Tensor, v_buf: Tensor) -> bool:
    """Whether two plain products beat SDPA, for query [B, H, M, D]."""
    heads, rows = query.shape[1:3]
    plain = query.device.type == "cpu" and query.dtype == torch.float32
    fits = rows in PRODUCTS and heads * rows * k_buf.shape[1] <= MOST_SCORES
    return plain and fits and not any(x.requires_grad for x in (query, k_buf, v_buf))


def _by_products(query: Tensor, k_buf: Tensor, v_buf: Tensor, scale: float, workspace: Workspace | None) -> Tensor:
    """Attention of query [B, H, M, D] over [B, S, H, D] row by row, so that the scores stay in the cache."""
    work = workspace or Workspace()
    shape = (*query.shape[1:3], k_buf.shape[1])
    scores, out = work.take("scores", shape, query.dtype, query.device), query.new_empty(query.shape)
    for q, k, v, to in zip(query * scale, k_buf, v_buf, out, strict=True):
        torch.bmm(q, k.permute(1, 2, 0), out=scores)
        torch.bmm(torch.softmax(scores, -1, out=scores), v.transpose(0, 1), out=to)
    return out
