"""Attention over the buffer in fast PyTorch: SDPA, or plain products where they are faster.

What is hidden is set to 0 before anything is multiplied, as 0 times NaN is NaN. Nothing here reads a value back
from a device other than the CPU.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from dkv.kernels.attention.reference import Rules
from dkv.kernels.attention.shares import Shares
from dkv.kernels.common import operation
from dkv.kernels.common.dtypes import wide
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
    shares: Shares | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`dkv.kernels.cached_attention`: the output, and the log-sum-exp where it is asked for.

    `shares` get the weights on a CPU, of packed rows without gaps, in float32, where heads are not grouped.
    """
    by_length = any(x is not None for x in (rules.query_lengths, rules.key_ranges, rules.key_gaps))
    if by_length and not (rules.of_pairs or rules.key_mask is not None) and operation.readable(q):
        return _each_row_alone(q, k_buf, v_buf, rules, scale, return_lse, workspace, shares)
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


def _attend(q, key, value, bias, scale, return_lse, workspace, means=None) -> tuple[Tensor, Tensor | None]:
    """Attention with a bias on the scores, [B, Hkv or 1, N or 1, S] or None.

    `means` [N, S] of every row, if they are given, get the mean of the weights over the heads.
    """
    if return_lse and bias is not None:
        return _with_lse(q, key, value, bias, scale)
    (batch, n, heads, size), kv_heads = q.shape, key.shape[2]
    group = heads // kv_heads
    query, keys, values = q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if group > 1:
        # The query heads of a key head become rows: K and V are never repeated.
        query = q.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(batch, kv_heads, n * group, size)
        if bias is not None and bias.shape[2] > 1:
            bias = bias.repeat_interleave(group, 2)
    lse = None
    if means is not None or (bias is None and _few_queries(query, key, value)):
        out, lse = _by_products(query, key, value, scale, return_lse, workspace, means)
    elif not return_lse:
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
    elif _sdpa_has_lse(query, keys, values, scale):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, scale=scale)
    else:
        return _with_lse(q, key, value, None, scale)

    out, lse = (x if x is None else _by_query(x, n, group) for x in (out, lse))
    if q.device.type == "cpu" and (q.element_size() < 4 or key.shape[1] < LANES):
        unseen = _unseen_by_sdpa(q, key)
        out, lse = out + unseen, lse if lse is None else lse + unseen.squeeze(-1)
    return out, lse


def _by_query(x: Tensor, n: int, group: int) -> Tensor:
    """[B, Hkv, n * group, ...] -> [B, n, Hq, ...]"""
    return x.transpose(1, 2) if group == 1 else x.unflatten(2, (n, group)).transpose(1, 2).flatten(2, 3)


def _sdpa_has_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether SDPA would choose its implementation for a CPU, which gives the log-sum-exp too, without a gradient.

    In half precision that is off by more than float32 rounds.
    """
    plain = query.device.type == "cpu" and query.element_size() >= 4
    if not plain or any(x.requires_grad for x in (query, key, value)):
        return False
    return torch._fused_sdp_choice(query, key, value, scale=scale) == SDPBackend.FLASH_ATTENTION.value


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


def _each_row_alone(
    q, k_buf, v_buf, rules: Rules, scale, return_lse, workspace, shares
) -> tuple[Tensor, Tensor | None]:
    """Attention where rows differ in length alone: each over its own slots, without padding and without a mask."""
    batch, slots = k_buf.shape[:2]
    if rules.query_starts is not None:
        packed, starts, lengths = q, rules.query_starts.tolist(), rules.query_lengths.tolist()
    else:
        packed, width = q.flatten(0, 1), q.shape[1]
        starts = [row * width for row in range(batch)]
        lengths = [width] * batch if rules.query_lengths is None else rules.query_lengths.clamp(max=width).tolist()
    alike = lengths[:1] * batch == lengths and [row * lengths[0] for row in range(batch)] == starts
    whole, keeps = rules.key_ranges is None and rules.key_gaps is None, _keeps(shares, q, k_buf, v_buf, rules)
    means: list[Tensor] | None = [] if keeps else None
    if whole and alike and batch and slots and batch * lengths[0] == len(packed) > 0:
        rows = packed.view(batch, -1, *packed.shape[1:])
        if keeps:
            means = shares.rows = [q.new_empty(rows.shape[1], slots) for _ in range(batch)]
        out, lse = _attend(rows, k_buf, v_buf, None, scale, return_lse, workspace, means)
        return out.reshape(q.shape), lse if lse is None else lse.reshape(q.shape[:-1])
    ranges = [(0, slots)] * batch if rules.key_ranges is None else rules.key_ranges.tolist()
    gaps = [(0, 0)] * batch if rules.key_gaps is None else rules.key_gaps.tolist()
    parts = []
    for row, (start, length, (first, stop), gap) in enumerate(zip(starts, lengths, ranges, gaps, strict=True)):
        length, runs = max(length, 0), _runs(max(first, 0), min(stop, slots), *gap)
        if keeps:
            means.append(q.new_empty(length, sum(run.stop - run.start for run in runs)))
        if length and runs:
            own, (key, value) = slice(start, start + length), (_joined(x[row : row + 1], runs) for x in (k_buf, v_buf))
            own_means = means[row : row + 1] if keeps else None
            out, lse = _attend(packed[own].unsqueeze(0), key, value, None, scale, return_lse, workspace, own_means)
            parts.append((own, out[0], lse if lse is None else lse[0]))
    if keeps:
        shares.rows = means
    lse = wide(packed).new_full(packed.shape[:2], -torch.inf) if return_lse else None
    if not parts:
        return q.masked_fill(torch.ones((), dtype=torch.bool), 0), lse if lse is None else lse.view(q.shape[:-1])
    if len(parts[0][1]) == len(packed):
        _, out, lse = parts[0]
    else:
        out = torch.zeros_like(packed)
        for own, part, part_lse in parts:
            out[own] = part
            if return_lse:
                lse[own] = part_lse
    return out.reshape(q.shape), lse if lse is None else lse.reshape(q.shape[:-1])


def _keeps(shares: Shares | None, q: Tensor, k_buf: Tensor, v_buf: Tensor, rules: Rules) -> bool:
    """Whether to keep the weights. With grouped heads SDPA is faster than products by more than that would spare."""
    if shares is None or rules.query_starts is None or rules.key_gaps is not None:
        return False
    plain = q.dtype == torch.float32 and q.shape[1] == k_buf.shape[2]
    return plain and not any(x.requires_grad for x in (q, k_buf, v_buf))


def _runs(first: int, stop: int, hidden: int, shown: int) -> list[slice]:
    """The slots from `first` to `stop - 1` but for those from `hidden` to `shown - 1`, in at most two pieces."""
    pieces = ((first, min(stop, hidden)), (max(first, shown), stop)) if hidden < shown else ((first, stop),)
    return [slice(start, end) for start, end in pieces if start < end]


def _joined(x: Tensor, runs: list[slice]) -> Tensor:
    """These slots of x [1, S, H, D].

    Two runs are copied: attention over each, joined by their log-sum-exp, took longer on a CPU, even where the second
    one is a single slot.
    """
    return x[:, runs[0]] if len(runs) == 1 else torch.cat([x[:, run] for run in runs], 1)


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


def _by_products(
    query: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    scale: float,
    return_lse: bool,
    workspace: Workspace | None,
    means: list[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of query [B, H, M, D] over [B, S, H, D] row by row, so that the scores stay in the cache."""
    work, (heads, entries), slots = workspace or Workspace(), query.shape[1:3], k_buf.shape[1]
    most = entries if means is None else max(MOST_SCORES // max(heads * slots, 1), 1)
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3]) if return_lse else None
    query = query * scale
    for row, first in product(range(len(query)), range(0, entries, max(most, 1))):
        some = slice(first, min(first + most, entries))
        scores = work.take("scores", (heads, some.stop - first, slots), query.dtype, query.device)
        torch.bmm(query[row, :, some], k_buf[row].permute(1, 2, 0), out=scores)
        top = scores.amax(-1) if return_lse else None
        torch.softmax(scores, -1, out=scores)
        if return_lse:
            # The largest weight is 1 over the sum of all exponentials.
            lse[row, :, some] = top - scores.amax(-1).log_()
        if means is not None:
            torch.mean(scores, 0, out=means[row][some])
        torch.bmm(scores, v_buf[row].transpose(0, 1), out=out[row, :, some])
    return out, lse
