"""Attention over the buffer in fast PyTorch.

What is hidden is set to 0 before anything is multiplied, as 0 times NaN is NaN. Nothing here reads a value back
from a device other than the CPU.
"""

import torch
from torch import Tensor

from dkv.kernels.attention.products import attend, weighed
from dkv.kernels.attention.reference import Rules
from dkv.kernels.attention.shares import Shares
from dkv.kernels.common import operation
from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.stored import Stored
from dkv.kernels.common.workspace import Workspace

# Fewer queries than these to an end, on average, are faster with a mask of pairs than end by end: 128 queries of 8
# heads of 64 over 128 keys took 0.67 ms with a mask, and by ends of 4, 16 and 32 queries 2.9, 0.96 and 0.59 ms.
QUERIES_OF_AN_END = 16


def cached_attention(
    q: Tensor,
    k_buf: Stored,
    v_buf: Stored,
    rules: Rules,
    most_queries: int,
    scale: float,
    return_lse: bool,
    *,
    workspace: Workspace | None = None,
    shares: Shares | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`dkv.kernels.cached_attention`: the output, and the log-sum-exp where it is asked for.

    `shares` get the weights on a CPU, of packed rows without gaps and ends, in float32. They tell what the log-sum-exp
    is asked for, which then is None.
    """
    by_length = any(x is not None for x in (rules.query_lengths, rules.key_ranges, rules.key_gaps))
    if by_length and not rules.masked and operation.readable(q):
        if shares is not None and _keeps(q, k_buf, v_buf, rules):
            return _with_shares(q, k_buf, v_buf, rules, scale, workspace or Workspace(), shares), None
        return _each_row_alone(q, k_buf, v_buf, rules, scale, return_lse, workspace)
    if rules.query_starts is not None:
        return _side_by_side(q, k_buf, v_buf, rules, most_queries, scale, return_lse, workspace)
    visible = rules.visible(q.shape[1], k_buf.shape[1])
    if visible is None:
        return attend(q, k_buf.plain(q.dtype), v_buf.plain(q.dtype), None, scale, return_lse, workspace)
    blind, unseen = ~visible.any(-1), ~visible.any(1)  # [B, N or 1], [B, S]
    q = q.masked_fill(blind[:, :, None, None], 0)
    key, value = (x.plain(q.dtype).masked_fill(unseen[:, :, None, None], 0) for x in (k_buf, v_buf))
    # A query that sees nothing is given everything, so that its softmax has a gradient; its result is dropped.
    bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~(visible | blind.unsqueeze(-1)), -torch.inf)
    bias, strange = bias.unsqueeze(1), None
    if rules.of_pairs:
        key, value, bias, strange = _finite(key, value, bias, visible)
    out, lse = attend(q, key, value, bias, scale, return_lse, workspace)
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


def _each_row_alone(q, k_buf, v_buf, rules: Rules, scale, return_lse, workspace) -> tuple[Tensor, Tensor | None]:
    """Attention where rows differ in length alone: each over its own slots, without padding and without a mask."""
    batch, slots = k_buf.shape[:2]
    if rules.query_starts is not None:
        packed, starts, lengths = q, rules.query_starts.tolist(), rules.query_lengths.tolist()
    else:
        packed, width = q.flatten(0, 1), q.shape[1]
        starts = [row * width for row in range(batch)]
        lengths = [width] * batch if rules.query_lengths is None else rules.query_lengths.clamp(max=width).tolist()
    ends = None if rules.query_ends is None or _behind(rules.query_ends, rules.key_ranges, slots) else rules.query_ends
    alike = lengths[:1] * batch == lengths and [row * lengths[0] for row in range(batch)] == starts
    whole = rules.key_ranges is None and rules.key_gaps is None and ends is None
    if whole and alike and batch and slots and batch * lengths[0] == len(packed) > 0:
        rows = packed.view(batch, -1, *packed.shape[1:])
        pair = k_buf.plain(q.dtype), v_buf.plain(q.dtype)
        out, lse = attend(rows, *pair, None, scale, return_lse, workspace)
        return out.reshape(q.shape), lse if lse is None else lse.reshape(q.shape[:-1])
    ranges = [(0, slots)] * batch if rules.key_ranges is None else rules.key_ranges.tolist()
    gaps = [(0, 0)] * batch if rules.key_gaps is None else rules.key_gaps.tolist()
    parts = []
    for row, (start, length, (first, stop), gap) in enumerate(zip(starts, lengths, ranges, gaps, strict=True)):
        length, runs = max(length, 0), _runs(max(first, 0), min(stop, slots), *gap)
        if length and runs:
            own, (key, value) = slice(start, start + length), (_joined(x, row, runs, q.dtype) for x in (k_buf, v_buf))
            query, how = packed[own].unsqueeze(0), (scale, return_lse, workspace)
            if ends is None:
                out, lse = attend(query, key, value, None, *how)
            else:
                seen = sum(ends[own].clamp(run.start, run.stop) - run.start for run in runs)
                out, lse = _first_keys(query, key, value, seen, *how)
            parts.append((own, out[0], lse if lse is None else lse[0]))
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


def _behind(ends: Tensor, ranges: Tensor | None, slots: int) -> bool:
    """Whether nothing is hidden by the ends of the queries."""
    stop = slots if ranges is None or not len(ranges) else min(int(ranges[:, 1].max()), slots)
    return not len(ends) or int(ends.min()) >= stop


def _first_keys(query, key, value, seen: Tensor, scale, return_lse, workspace) -> tuple[Tensor, Tensor | None]:
    """Attention of one row, query [1, N, H, D], where each sees the first `seen` [N] of the keys alone."""
    numbers, counts = (x.tolist() for x in torch.unique_consecutive(seen, return_counts=True))
    least, most, how = min(numbers), max(*numbers, 1), (scale, return_lse, workspace)
    few = len(numbers) > 1 and len(seen) < QUERIES_OF_AN_END * len(numbers)
    if least and not few:
        queries = zip(query.split(counts, 1), numbers, strict=True)
        found = [attend(own, key[:, :number], value[:, :number], None, *how) for own, number in queries]
        out, lse = zip(*found, strict=True)
        return torch.cat(out, 1), torch.cat(lse, 1) if return_lse else None
    key, value, mask = key[:, :most], value[:, :most], torch.arange(most) < seen.unsqueeze(1)
    if least and _finite_without_gradient(key[:, least:]) and _finite_without_gradient(value[:, least:]):
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        return attend(query, key, value, bias[None, None], *how)
    rules = Rules(mask=mask.unsqueeze(0))
    pair = Stored(key), Stored(value)
    return cached_attention(query, *pair, rules, len(seen), scale, return_lse, workspace=workspace)


def _finite_without_gradient(x: Tensor) -> bool:
    return not x.requires_grad and bool((x * 0).sum() == 0)


def _keeps(q: Tensor, k_buf: Stored, v_buf: Stored, rules: Rules) -> bool:
    """Whether the weights can be kept."""
    plain = q.dtype == torch.float32 and rules.query_starts is not None and rules.key_gaps is rules.query_ends is None
    return plain and not any(x.requires_grad for x in (q, k_buf.numbers, v_buf.numbers))


def _with_shares(q, k_buf, v_buf, rules: Rules, scale, workspace: Workspace, shares: Shares) -> Tensor:
    """Attention of packed rows by plain products, whose weights are kept."""
    (batch, slots), out, shares.rows = k_buf.shape[:2], torch.zeros_like(q), []
    ranges = [(0, slots)] * batch if rules.key_ranges is None else rules.key_ranges.tolist()
    parts = zip(rules.query_starts.tolist(), rules.query_lengths.tolist(), ranges, strict=True)
    for row, (start, length, (first, stop)) in enumerate(parts):
        own, first, stop = slice(start, start + max(length, 0)), max(first, 0), min(stop, slots)
        seen = slice(first, max(first, stop))
        mean = q.new_empty(own.stop - start, seen.stop - first)
        if mean.numel():
            key, value = (x.at((row, seen)).plain(q.dtype) for x in (k_buf, v_buf))
            weighed(q[own], key, value, scale, workspace, mean, out[own])
        shares.rows.append((own, seen, mean))
    return out


def _runs(first: int, stop: int, hidden: int, shown: int) -> list[slice]:
    """The slots from `first` to `stop - 1` but for those from `hidden` to `shown - 1`, in at most two pieces."""
    pieces = ((first, min(stop, hidden)), (max(first, shown), stop)) if hidden < shown else ((first, stop),)
    return [slice(start, end) for start, end in pieces if start < end]


def _joined(x: Stored, row: int, runs: list[slice], dtype: torch.dtype) -> Tensor:
    """These slots of a row of x [B, S, H, D], as a batch of one.

    Two runs are copied: attention over each, joined by their log-sum-exp, took longer on a CPU, even where the second
    one is a single slot.
    """
    found = [x.at((slice(row, row + 1), run)).plain(dtype) for run in runs]
    return found[0] if len(runs) == 1 else torch.cat(found, 1)


def _side_by_side(
    q, k_buf, v_buf, rules: Rules, most_queries, scale, return_lse, workspace
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed queries, which are brought to [B, most_queries, Hq, D] and back."""
    column = torch.arange(most_queries, device=q.device)
    own = column < rules.query_lengths.unsqueeze(1)
    entry = rules.query_starts.unsqueeze(1) + column  # [B, most_queries], of T
    at = entry.where(own, 0)
    ends = None if rules.query_ends is None else rules.query_ends[at]
    rules, query = rules._replace(query_starts=None, query_ends=ends), q[at]
    found = cached_attention(query, k_buf, v_buf, rules, most_queries, scale, return_lse, workspace=workspace)
    # What is of no row is written behind the last entry.
    to = entry.where(own, len(q))
    out, lse = (x if x is None else x.new_zeros(len(q) + 1, *x.shape[2:]).index_put_((to,), x)[:-1] for x in found)
    return out, lse
