"""Attention over the buffer, eager, for any float dtype: what is right."""

from typing import NamedTuple

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.stored import Stored


class Rules(NamedTuple):
    """Rules of visibility, as `cached_attention` describes them; a key is visible when every rule allows it."""

    query_lengths: Tensor | None = None
    key_ranges: Tensor | None = None
    key_mask: Tensor | None = None
    mask: Tensor | None = None
    query_blocks: Tensor | None = None
    key_blocks: Tensor | None = None
    query_starts: Tensor | None = None
    key_gaps: Tensor | None = None
    query_ends: Tensor | None = None  # [T] as `query_starts` say, or without these [B, N]

    @property
    def of_pairs(self) -> bool:
        """Whether a key may be visible to some of the queries that are asked, and hidden from others."""
        return any(x is not None for x in (self.mask, self.key_blocks, self.query_ends))

    @property
    def masked(self) -> bool:
        """Whether any key of a row may be hidden, and not only what stands at its ends or in a gap."""
        return any(x is not None for x in (self.mask, self.key_blocks, self.key_mask))

    def visible(self, queries: int, keys: int) -> Tensor | None:
        """bool [B, N or 1, S], or None when every query sees every key."""
        parts = []
        if self.key_ranges is not None:
            slot = torch.arange(keys, device=self.key_ranges.device)
            parts.append(((slot >= self.key_ranges[:, :1]) & (slot < self.key_ranges[:, 1:])).unsqueeze(1))
        if self.key_gaps is not None:
            slot = torch.arange(keys, device=self.key_gaps.device)
            parts.append(((slot < self.key_gaps[:, :1]) | (slot >= self.key_gaps[:, 1:])).unsqueeze(1))
        if self.key_mask is not None:
            parts.append(self.key_mask.unsqueeze(1))
        if self.mask is not None:
            parts.append(self.mask)
        if self.key_blocks is not None:
            parts.append(self.key_blocks.unsqueeze(1) <= self.query_blocks.unsqueeze(2))
        if self.query_ends is not None:
            slot = torch.arange(keys, device=self.query_ends.device)
            parts.append(slot < self.query_ends.unsqueeze(2))
        if self.query_lengths is not None:
            query = torch.arange(queries, device=self.query_lengths.device)
            parts.append((query < self.query_lengths[:, None]).unsqueeze(2))
        visible = None
        for part in parts:
            visible = part if visible is None else visible & part
        return visible


def cached_attention(
    q: Tensor, k_buf: Stored, v_buf: Stored, rules: Rules, most_queries: int, scale: float, return_lse: bool, **_
) -> tuple[Tensor, Tensor | None]:
    """`dkv.kernels.cached_attention`: the output, and the log-sum-exp where it is asked for.

    `most_queries` is N, or of packed rows no less than the queries of one: what spares work, and changes no result.
    """
    if rules.query_starts is not None:
        return _packed(q, k_buf, v_buf, rules, scale, return_lse)
    group = q.shape[2] // k_buf.shape[2]
    key, value = (x.wide(q).repeat_interleave(group, 2) for x in (k_buf, v_buf))
    scores = torch.einsum("bnhd,bshd->bhns", wide(q), key) * scale
    visible = rules.visible(q.shape[1], k_buf.shape[1])
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    out = weighted_sum(weights, value, visible).to(q.dtype)
    return out, lse.transpose(1, 2) if return_lse else None


def _packed(q, k_buf, v_buf, rules: Rules, scale, return_lse) -> tuple[Tensor, Tensor | None]:
    """Packed queries: every row is a batch of its own. Entries of no row give 0."""
    out, lse = torch.zeros_like(q), wide(q).new_zeros(q.shape[:2])
    for row, (start, length) in enumerate(zip(rules.query_starts.tolist(), rules.query_lengths.tolist(), strict=True)):
        own, this = slice(start, start + max(length, 0)), slice(row, row + 1)
        of_keys = {name: getattr(rules, name) for name in ("key_ranges", "key_gaps", "key_mask")}
        ends = None if rules.query_ends is None else rules.query_ends[own].unsqueeze(0)
        of_row = Rules(**{name: x[this] for name, x in of_keys.items() if x is not None}, query_ends=ends)
        pair = k_buf.at(this), v_buf.at(this)
        found, found_lse = cached_attention(q[own].unsqueeze(0), *pair, of_row, length, scale, True)
        out[own], lse[own] = found[0], found_lse[0]
    return out, lse if return_lse else None


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
