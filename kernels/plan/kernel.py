"""The kernels of a step's plan: a program takes a row, tile after tile of its slots, and carries what it has counted.

Sizes and strides only bound masks and place rows: they are not specialised on, so that another length compiles nothing.
"""

import triton
import triton.language as tl

SIZES = ["slots", "now_row", "masked_row", "rank_row", "active_row", "chosen_row", "everything_row"]


@triton.jit
def loaded(mask, row, slot, inside):
    """bool [I], a part of a row of a mask; False where it is not `inside`."""
    return tl.load(mask + row + slot, mask=inside, other=0) != 0


@triton.jit
def opened(masked, masked_row, rank, rank_row, slot, inside, start, stop):
    """bool [I], which slots are masked, and which of these are in the block from `start` to `stop`."""
    masks = loaded(masked, masked_row, slot, inside)
    place = tl.load(rank + rank_row + slot, mask=masks, other=-1)
    return masks, masks & (place >= start) & (place < stop)


@triton.jit
def _computed(active, active_row, everything, everything_row, slot, inside, full, length):
    """bool [I], the slots that a pass computes."""
    if everything is not None:
        whole = loaded(everything, everything_row, slot, inside & full)
    else:
        whole = inside & (slot < length) & full
    return whole | loaded(active, active_row, slot, inside & (full == 0))


@triton.jit(do_not_specialize=SIZES)
def plan_kernel(
    now,
    masked,
    rank,
    lengths,
    active,
    chosen,
    everything,
    cut,
    invalid,
    computed,
    scored,
    eligible,
    count,
    report,
    slots,
    now_row,
    masked_row,
    rank_row,
    active_row,
    chosen_row,
    everything_row,
    START: tl.constexpr,
    STOP: tl.constexpr,
    LEFT: tl.constexpr,
    FULL: tl.constexpr,
    KIND: tl.constexpr,
    DYNAMIC: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    SHIFTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """What `plan` of the reference says of one row; grid (B,). `computed`, `scored` and `eligible` are dense."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    step = now + row * now_row
    start, stop, full = tl.load(step + START), tl.load(step + STOP), tl.load(step + FULL) != 0
    length = tl.load(lengths + row)
    lane = tl.arange(0, TILE)
    masks_seen, open_seen = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    for first in tl.range(0, slots, TILE, num_stages=1):
        slot = first + lane
        masks, opens = opened(masked, row * masked_row, rank, row * rank_row, slot, slot < slots, start, stop)
        masks_seen += masks.to(tl.int32)
        open_seen += opens.to(tl.int32)
    unfilled = tl.sum(masks_seen)
    fills = tl.sum(open_seen) - tl.load(step + LEFT)
    if DYNAMIC:
        fills = tl.maximum(fills, 1)
    unfinished = unfilled > 0
    active_seen, scored_seen = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    for first in tl.range(0, slots, TILE, num_stages=1):
        slot = first + lane
        inside = slot < slots
        taken = inside & unfinished
        own = _computed(active, row * active_row, everything, row * everything_row, slot, taken, full, length)
        if KIND == "chosen":
            score = loaded(chosen, row * chosen_row, slot, taken)
        else:
            masks, score = opened(masked, row * masked_row, rank, row * rank_row, slot, inside, start, stop)
            if KIND == "window":
                may = (score & full) | loaded(chosen, row * chosen_row, slot, inside & (full == 0))
                tl.store(eligible + row * slots + slot, may, mask=inside)
            elif KIND == "masks":
                tl.store(eligible + row * slots + slot, score, mask=inside)
                score = masks
            else:
                score = score & (fills > 0)
            if SHIFTED:
                before = tl.maximum(slot - 1, 0)
                score = score & _computed(
                    active, row * active_row, everything, row * everything_row, before, taken, full, length
                )
            else:
                score = score & own
        tl.store(computed + row * slots + slot, own, mask=inside)
        tl.store(scored + row * slots + slot, score, mask=inside)
        active_seen += own.to(tl.int32)
        scored_seen += score.to(tl.int32)
    if BY_CHANCE:
        tl.store(count + row, slots)
    else:
        tl.store(count + row, fills)
    tl.store(report + row, tl.sum(active_seen))
    tl.store(report + rows + row, tl.sum(scored_seen))
    tl.store(report + 2 * rows + row, unfilled)
    tl.store(report + 3 * rows + row, tl.load(cut + row))
    tl.store(report + 4 * rows + row, (tl.load(invalid + row) != 0).to(tl.int64))


@triton.jit
def _before(report, row, ROWS: tl.constexpr):
    """The sum of a line of the report over the rows before `row`."""
    total = tl.zeros((ROWS,), tl.int64)
    for first in tl.range(0, row, ROWS, num_stages=1):
        other = first + tl.arange(0, ROWS)
        total += tl.load(report + other, mask=other < row, other=0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["slots", "total", "scored_total", "tokens_row", "active_row", "scored_row"])
def pack_kernel(
    tokens,
    active,
    scored,
    lengths,
    report,
    entries,
    positions,
    entry_rows,
    scored_slots,
    scored_rows,
    places,
    starts,
    slots,
    total,
    scored_total,
    tokens_row,
    active_row,
    scored_row,
    SHIFTED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The entries of one row, and after those of the last row what fills up; grid (B,)."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    first_entry, first_scored = _before(report, row, ROWS), _before(report + rows, row, ROWS)
    tl.store(starts + row, first_entry)
    tl.store(starts + rows + row, first_scored)
    row = row.to(tl.int64)
    length = tl.load(lengths + row)
    lane = tl.arange(0, TILE)
    entry, found = first_entry, first_scored
    for first in tl.range(0, length, TILE, num_stages=1):
        slot = first + lane
        inside = slot < length
        own = loaded(active, row * active_row, slot, inside)
        # The active slots of the row up to each one.
        counted = tl.cumsum(own.to(tl.int32), 0)
        at = entry + counted - 1
        keep = own & (at < total)
        tl.store(entries + at, tl.load(tokens + row * tokens_row + slot, mask=own, other=0), mask=keep)
        tl.store(positions + at, slot.to(tl.int64), mask=keep)
        tl.store(entry_rows + at, row + tl.zeros_like(at), mask=keep)
        score = loaded(scored, row * scored_row, slot, inside)
        place = found + tl.cumsum(score.to(tl.int32), 0) - 1
        source = counted
        if SHIFTED:
            # The slot before predicts; slot 0 has none, and is predicted by itself.
            source -= tl.where(slot > 0, own.to(tl.int32), 0)
        keep = score & (place < scored_total)
        tl.store(scored_slots + place, slot.to(tl.int64), mask=keep)
        tl.store(scored_rows + place, row + tl.zeros_like(place), mask=keep)
        tl.store(places + place, tl.maximum(entry + source - 1, first_entry), mask=keep)
        entry += tl.sum(own.to(tl.int32))
        found += tl.sum(score.to(tl.int32))
    if row == rows - 1:
        nothing, spare = tl.zeros((TILE,), tl.int64), tl.zeros((TILE,), tl.int64) + slots
        token = tl.load(tokens + slots)
        for first in tl.range(entry, total, TILE, num_stages=1):
            at = first + lane
            tl.store(entries + at, token + nothing, mask=at < total)
            tl.store(positions + at, spare, mask=at < total)
            tl.store(entry_rows + at, nothing, mask=at < total)
        for first in tl.range(found, scored_total, TILE, num_stages=1):
            at = first + lane
            tl.store(scored_slots + at, spare, mask=at < scored_total)
            tl.store(scored_rows + at, nothing, mask=at < scored_total)
            tl.store(places + at, nothing, mask=at < scored_total)


@triton.jit(do_not_specialize=["slots", "count", "window", "chosen_row", "masked_row", "centers_row"])
def window_kernel(
    chosen, masked, centers, out, slots, count, window, chosen_row, masked_row, centers_row, TILE: tl.constexpr
):
    """The windows of one row, one after the other; grid (B,). `out` is dense.

    Distances are all different: 2 |offset|, to the left one less. A window is what lies within the largest radius that
    has no more than `window` open slots, which is found bit by bit.
    """
    row = tl.program_id(0).to(tl.int64)
    lane, out = tl.arange(0, TILE), out + row * slots
    for first in tl.range(0, slots, TILE, num_stages=1):
        slot = first + lane
        tl.store(out + slot, loaded(chosen, row * chosen_row, slot, slot < slots), mask=slot < slots)
    # What was stored is read by other lanes.
    tl.debug_barrier()
    largest = 1
    while largest < 2 * slots:
        largest *= 2
    i = 0
    while i < count:
        center = tl.load(centers + row * centers_row + i)
        i += 1
        if center >= slots:
            i = count
        else:
            radius, bit = 0, largest
            while bit > 0:
                near = _within(out, masked, row * masked_row, slots, center, radius + bit, lane, False)
                if near <= window:
                    radius += bit
                bit //= 2
            tl.debug_barrier()
            _within(out, masked, row * masked_row, slots, center, radius, lane, True)
            tl.debug_barrier()


@triton.jit
def _within(out, masked, masked_row, slots, center, radius, lane, CHOOSE: tl.constexpr):
    """How many masked slots that are not chosen yet lie within a radius; they become chosen."""
    found = tl.zeros_like(lane)
    for first in tl.range(0, slots, lane.shape[0], num_stages=1):
        slot = first + lane
        offset = slot - center
        near = 2 * tl.abs(offset) - (offset < 0).to(tl.int64) < radius
        near = near & loaded(masked, masked_row, slot, (slot < slots) & near)
        near = near & (loaded(out, 0, slot, near) == 0)
        found += near.to(tl.int32)
        if CHOOSE:
            tl.store(out + slot, near, mask=near)
    return tl.sum(found)
