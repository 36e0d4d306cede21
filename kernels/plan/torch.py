"""The masks of a pass, its packed entries, and windows around slots in fast PyTorch, without reading anything back."""

import torch
from torch import Tensor

from dkv.kernels.plan.reference import FIELDS


def columns(now: Tensor, *names: str) -> list[Tensor]:
    """Fields [B, 1] of the steps `now` [B, 7]. Cheaper than to split off all of them."""
    return [now.narrow(1, FIELDS.index(name), 1) for name in names]


def plan(now, masked, rank, lengths, active, chosen, everything, cut, invalid, kind, dynamic, by_chance, shifted):
    start, stop, left, full = columns(now, "start", "stop", "left", "full")
    full, slots = full.bool(), masked.shape[1]
    open_ = masked & (rank >= start) & (rank < stop)
    count = open_.sum(1, keepdim=True) - left
    if dynamic:
        count = count.clamp(min=1)
    unfilled = masked.sum(1, keepdim=True)
    unfinished = unfilled > 0
    if everything is None:
        everything = torch.arange(slots, device=masked.device) < lengths.unsqueeze(1)
    active = torch.where(full, everything, active) & unfinished
    eligible = None
    if kind == "chosen":
        scored = chosen & unfinished
    else:
        # A slot is predicted by its own output, or in a shifted model by that of the slot before it.
        scored = masked if kind == "masks" else open_
        scored = scored & (torch.cat((active[:, :1], active[:, :-1]), 1) if shifted else active)
        if kind == "open":
            scored &= count > 0
        else:
            eligible = open_ if kind == "masks" else torch.where(full, open_, chosen)
    count = torch.full_like(lengths, slots) if by_chance else count.squeeze(1)
    report = (active.sum(1), scored.sum(1), unfilled.squeeze(1), cut, invalid)
    return active, scored, eligible, count, torch.stack(report)


def pack(tokens, active, scored, lengths, report, total, scored_total, shifted):
    width = tokens.shape[1]
    (rows, positions), (scored_rows, slots) = _places(active, total), _places(scored, scored_total)
    source = (slots - int(shifted)).clamp_(min=0)
    filling = slots == width - 1
    # A single row, or rows of the spare slot alone.
    if len(tokens) == 1 or width == 1:
        starts = report.new_zeros(2, len(tokens))
        places = torch.searchsorted(positions, source, right=True).sub_(1).clamp_(min=0)
        return tokens.take(positions), positions, rows, slots, scored_rows, places.masked_fill_(filling, 0), starts
    starts = report[:2].cumsum(1) - report[:2]
    # The active slots of all rows up to a source: those of the rows before it are `starts`.
    before = active.reshape(-1).cumsum(0).take(source.clamp_(max=width - 2) + scored_rows * (width - 1))
    places = torch.maximum(before - 1, starts[0].index_select(0, scored_rows)).masked_fill_(filling, 0)
    return tokens.take(positions + rows * width), positions, rows, slots, scored_rows, places, starts


def _places(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows and slots, int64 [count], where `mask` [B, S] holds, filled up with slot S of row 0."""
    size = mask.shape[1]
    if len(mask) == 1:
        slots = mask.reshape(-1).nonzero_static(size=count, fill_value=size).view(-1)
        return torch.zeros_like(slots), slots
    rows, slots = mask.nonzero_static(size=count, fill_value=size).unbind(1)
    return rows.masked_fill(slots == size, 0), slots.contiguous()


def with_masked_window(chosen, masked, centers, window):
    slots = chosen.shape[1]
    slot, far = torch.arange(slots, device=chosen.device), 4 * slots
    chosen = chosen.clone()
    for center in centers.unbind(1):
        offset = slot - center[:, None]
        distance = 2 * offset.abs() - (offset < 0).long()
        open_ = masked & ~chosen & (center < slots)[:, None]
        nearest = torch.where(open_, distance, far).topk(min(window, slots), largest=False)
        chosen.scatter_(1, nearest.indices, chosen.gather(1, nearest.indices) | (nearest.values < far))
    return chosen
