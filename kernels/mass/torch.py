"""The attention that slots get, in fast PyTorch. Nothing here reads a value back from a device other than the CPU."""

import math

import torch
from torch import Tensor

from dkv.kernels.common import operation
from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.stored import Stored
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.mass.reference import finite_or_no_share

LOG2E = 1 / math.log(2)


def attention_mass(
    q, k_buf, lse, weight, query_starts, query_lengths, key_ranges, most_queries, scale, *, workspace=None, shares=None
) -> Tensor:
    """`dkv.kernels.attention_mass`; where attention has left its `shares`, from these, and `lse` is not read."""
    if shares is not None and shares.rows is not None:
        return shares.mass(weight, k_buf)
    lse, rows = finite_or_no_share(lse), (query_starts, query_lengths, key_ranges)
    if operation.readable(q):
        return _each_row_alone(q, k_buf, lse, weight, *rows, scale, workspace or Workspace())
    return _side_by_side(q, k_buf, lse, weight, *rows, most_queries, scale)


def _each_row_alone(q, k_buf, lse, weight, query_starts, query_lengths, key_ranges, scale, work) -> Tensor:
    """Every row over its own visible slots."""
    (batch, slots), ranges = k_buf.shape[:2], None if key_ranges is None else key_ranges.clamp(min=0).tolist()
    mass = lse.new_zeros(batch, slots)
    for row, (start, length) in enumerate(zip(query_starts.tolist(), query_lengths.tolist(), strict=True)):
        own, seen = slice(start, start + max(length, 0)), slice(*(ranges[row] if ranges else (0, slots)))
        if length > 0 and mass[row, seen].numel():
            mass[row, seen] = _of_row(q[own], k_buf.at((row, seen)), lse[own], weight[own], scale, work)
    return mass


def _of_row(q: Tensor, key: Stored, lse: Tensor, weight: Tensor, scale: float, work: Workspace) -> Tensor:
    """What the queries [N, Hq, D] of a row give to keys [S, Hkv, D]: [S]."""
    heads, (slots, kv_heads) = q.shape[1], key.shape[:2]
    # The query heads of a key head become rows of one product. Powers of 2 are faster than those of e.
    parts = (wide(q) * (scale * LOG2E), lse * LOG2E)
    query, shift = (x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2) for x in parts)
    share = (weight / heads).repeat_interleave(heads // kv_heads)
    scores = work.take("scores", (query.shape[1], slots), query.dtype, q.device)
    mass = scores.new_zeros(slots)
    for head in range(kv_heads):
        torch.mm(query[head], key.at((slice(None), head)).wide(q).T, out=scores)
        mass.addmv_(scores.sub_(shift[head].unsqueeze(1)).exp2_().T, share)
    return mass


def _side_by_side(q, k_buf, lse, weight, query_starts, query_lengths, key_ranges, most_queries, scale) -> Tensor:
    """All rows at once, their queries brought to [B, most_queries, ...], one key head after the other."""
    slots, kv_heads = k_buf.shape[1:3]
    column, slot = (torch.arange(n, device=q.device) for n in (most_queries, slots))
    own = column < query_lengths.unsqueeze(1)
    entry = (query_starts.unsqueeze(1) + column).where(own, 0)  # [B, most_queries], of T
    query = wide(q[entry].masked_fill(~own[:, :, None, None], 0)) * scale
    lse = lse[entry].masked_fill(~own.unsqueeze(2), torch.inf)
    weight = (weight[entry] / q.shape[1]).masked_fill(~own, 0)
    mass = query.new_zeros(k_buf.shape[:2])
    parts = zip(query.chunk(kv_heads, 2), lse.chunk(kv_heads, 2), k_buf.plain(q.dtype).unbind(2), strict=True)
    for of_head, shift, key in parts:
        scores = torch.einsum("bngd,bsd->bngs", of_head, wide(key))
        mass += torch.einsum("bngs,bn->bs", scores.sub_(shift.unsqueeze(-1)).exp_(), weight)
    if key_ranges is None:
        return mass
    return mass.masked_fill((slot < key_ranges[:, :1]) | (slot >= key_ranges[:, 1:]), 0)
