"""The masks of a pass, its packed entries, and windows around slots, eager, one row after the other: what is right."""

import torch
from torch import Tensor

# The columns of a step of a schedule. `index` is its number and `in_block` that within its block; `start` and `stop`
# are the block, among the slots to fill of the row; `left` is how many of these have no token after the step, at most;
# `next_block` is the number of the step that begins the next block; `full` is 1 where every slot is computed, else 0.
FIELDS = ("index", "in_block", "start", "stop", "left", "next_block", "full")
# Which slots are scored, see `dkv.kernels.plan_pass`.
KINDS = ("open", "window", "chosen", "masks")
# Those in which not all that is scored may be filled.
ELIGIBLE = ("window", "masks")


def plan(
    now,
    masked,
    rank,
    lengths,
    active,
    chosen: Tensor | None,
    everything: Tensor | None,
    cut,
    invalid,
    kind: str,
    dynamic: bool,
    by_chance: bool,
    shifted: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    rows, slots = masked.shape
    computed, scored, eligible = (torch.zeros_like(masked) for _ in range(3))
    count, report = torch.empty_like(lengths), lengths.new_empty(5, rows)
    for b in range(rows):
        step = dict(zip(FIELDS, now[b].tolist(), strict=True))
        open_ = masked[b] & (rank[b] >= step["start"]) & (rank[b] < step["stop"])
        fills = int(open_.sum()) - step["left"]
        if dynamic:
            fills = max(fills, 1)
        count[b] = slots if by_chance else fills
        if masked[b].any():
            whole = torch.arange(slots) < int(lengths[b]) if everything is None else everything[b]
            computed[b] = whole if step["full"] else active[b]
            # A slot is predicted by its own output, or in a shifted model by that of the slot before it.
            reached = torch.cat((computed[b, :1], computed[b, :-1])) if shifted else computed[b]
            if kind == "chosen":
                scored[b] = chosen[b]
            elif kind == "masks":
                scored[b] = masked[b] & reached
            elif kind == "window" or fills > 0:
                scored[b] = open_ & reached
        eligible[b] = chosen[b] if kind == "window" and not step["full"] else open_
        report[:, b] = torch.stack([*(x[b].sum() for x in (computed, scored, masked)), cut[b], invalid[b]])
    return computed, scored, eligible if kind in ELIGIBLE else None, count, report


def pack(
    tokens, active, scored, lengths, report, total: int, scored_total: int, shifted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    spare = active.shape[1]
    starts = report[:2].cumsum(1) - report[:2]
    packed, places = ([tokens.new_zeros(size) for _ in range(3)] for size in (total, scored_total))
    packed[0].copy_(tokens[:1, spare])
    packed[1].fill_(spare)
    places[0].fill_(spare)
    for b in range(len(active)):
        first, second = starts[:, b].tolist()
        for i, slot in enumerate(active[b].nonzero()[:, 0].tolist()[: max(total - first, 0)]):
            for x, value in zip(packed, (tokens[b, slot], slot, b), strict=True):
                x[first + i] = value
        for i, slot in enumerate(scored[b].nonzero()[:, 0].tolist()[: max(scored_total - second, 0)]):
            source = min(max(slot - shifted, 0), int(lengths[b]) - 1)
            before = int(active[b, : source + 1].sum())
            for x, value in zip(places, (slot, b, first + max(before - 1, 0)), strict=True):
                x[second + i] = value
    return *packed, *places, starts


def with_masked_window(chosen, masked, centers, window: int) -> Tensor:
    chosen, slots = chosen.clone(), chosen.shape[1]
    for b in range(len(chosen)):
        for center in centers[b].tolist():
            open_ = (masked[b] & ~chosen[b]).nonzero()[:, 0].tolist() if center < slots else []
            nearest = sorted(open_, key=lambda slot: (abs(slot - center), slot))
            chosen[b, nearest[:window]] = True
    return chosen
