"""Attention with a bias at most, in fast PyTorch: SDPA, or plain products where they are faster."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.workspace import Workspace

# SDPA on a CPU takes the maximum of fewer scores than this one by one, in a way that skips NaN.
LANES = 16
# Rows of queries for which two plain products are taken to beat SDPA on a CPU, which cuts fewer than 192 of them into
# tiles of 32 (ATen's FlashAttentionKernel.cpp). No measurement of the two bounds has been kept.
PRODUCTS = range(33, 192)
# The most scores of all heads at once, 16 MiB, so that they stay near the CPU. Not timed.
MOST_SCORES = 1 << 22


def attend(q, key, value, bias, scale, return_lse, workspace) -> tuple[Tensor, Tensor | None]:
    """Attention with a bias on the scores, [B, Hkv or 1, N or 1, S] or None."""
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
    if bias is None and _few_queries(query, key, value):
        out, lse = _by_products(query, key, value, scale, return_lse, workspace)
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


def _few_queries(query: Tensor, k_buf: Tensor, v_buf: Tensor) -> bool:
    """Whether two plain products beat SDPA, for query [B, H, M, D]."""
    heads, rows = query.shape[1:3]
    plain = query.device.type == "cpu" and query.dtype == torch.float32
    fits = rows in PRODUCTS and heads * rows * k_buf.shape[1] <= MOST_SCORES
    return plain and fits and not any(x.requires_grad for x in (query, k_buf, v_buf))


def _by_products(
    query: Tensor, k_buf: Tensor, v_buf: Tensor, scale: float, return_lse: bool, workspace: Workspace | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of query [B, H, M, D] over [B, S, H, D] row by row, so that the scores stay in the cache."""
    scores = (workspace or Workspace()).take("scores", (*query.shape[1:3], k_buf.shape[1]), query.dtype, query.device)
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3]) if return_lse else None
    query = query * scale
    for row in range(len(query)):
        torch.bmm(query[row], k_buf[row].permute(1, 2, 0), out=scores)
        top = scores.amax(-1) if return_lse else None
        torch.softmax(scores, -1, out=scores)
        if return_lse:
            # The largest weight is 1 over the sum of all exponentials.
            lse[row] = top - scores.amax(-1).log_()
        torch.bmm(scores, v_buf[row].transpose(0, 1), out=out[row])
    return out, lse


def weighed(q, key, value, scale: float, work: Workspace, mean: Tensor, out: Tensor) -> None:
    """Attention of q [N, Hq, D] over key and value [S, Hkv, D], into out; into mean [N, S] that of the weights."""
    (entries, heads, size), (slots, kv_heads) = q.shape, key.shape[:2]
    # The query heads of a key head become rows of one product.
    query = (q * scale).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    out, key, value = out.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3), key.permute(1, 2, 0), value.transpose(0, 1)
    # So few at a time that the scores stay in the cache.
    most = max(MOST_SCORES // (heads * slots), 1)
    for first in range(0, entries, most):
        some = slice(first, min(first + most, entries))
        count = some.stop - first
        scores = work.take("scores", (kv_heads, heads // kv_heads * count, slots), q.dtype, q.device)
        torch.bmm(query[:, :, some].reshape(kv_heads, -1, size), key, out=scores)
        torch.softmax(scores, -1, out=scores)
        # A sum takes half the time of a mean.
        torch.sum(scores.view(heads, count, slots), 0, out=mean[some]).div_(heads)
        out[:, :, some] = torch.bmm(scores, value).unflatten(1, (-1, count))
