"""Attention over the buffer, eager, for any float dtype: what is right."""

from typing import Any

import torch
from torch import Tensor

from dkv.kernels.attention.rules import Rules
from dkv.kernels.common.dtypes import wide


def cached_attention(
    q: Tensor, k_buf: Tensor, v_buf: Tensor, rules: Rules, scale: float, return_lse: bool, workspace: Any = None
) -> tuple[Tensor, Tensor | None]:
    """`dkv.kernels.cached_attention`: the output, and the log-sum-exp where it is asked for."""
    group = q.shape[2] // k_buf.shape[2]
    key, value = (wide(x).repeat_interleave(group, 2) for x in (k_buf, v_buf))
    scores = torch.einsum("bnhd,bshd->bhns", wide(q), key) * scale
    visible = rules.visible(q.shape[1], k_buf.shape[1])
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    out = weighted_sum(weights, value, visible).to(q.dtype)
    return out, lse.transpose(1, 2) if return_lse else None


def weighted_sum(weights: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """The values [B, S, H, D] that a query sees, times their weights [B, H, N, S]: [B, N, H, D].

    A hidden value has the weight 0, but 0 times NaN is NaN: values that are not finite are added one by one, where
    they are seen.
    """
    if visible is None:
        return torch.einsum("bhns,bshd->bnhd", weights, value)
    visible, strange = visible.expand(-1, -1, value.shape[1]), ~value.isfinite()
    out = torch.einsum("bhns,bshd->bnhd", weights, value.masked_fill(strange, 0))
    for slot in strange.any((0, 2, 3)).nonzero().flatten():
        term = weights[..., slot].transpose(1, 2).unsqueeze(-1) * value[:, None, slot]
        seen = visible[:, :, slot, None, None] & strange[:, None, slot]
        out = out + torch.where(seen, term, 0)
    return out
