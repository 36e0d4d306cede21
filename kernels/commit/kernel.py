"""The kernels of the commit: `commit_kernel`, in which an entry counts those that come before it, and `advance_kernel`.

The latter takes a step: a program takes a row, tile after tile of its slots, and carries what it has counted.

The lanes that own a slot decide all about it, so that nothing is read that another lane has written: the entry of a
scored slot is a running count, and whether it is filled is told by the entries that come before it, which are counted.
Sizes and strides only bound masks and place rows: they are not specialised on, so that another length compiles nothing.
"""

import triton
import triton.language as tl

from dkv.kernels.commit.ranking import Scored, anchors, less_one, level, nats, places, scored_entries, spent
from dkv.kernels.plan.kernel import loaded

SIZES = ["radius", "slots", "entries", "steps", "ends_count", "pad", "table_row", "starts"]
ROWS = ["tokens", "masked", "fresh", "seen", "rank", "now", "active", "scored", "eligible"]


@triton.jit
def _confidence(confidence, row, i, inside):
    """Confidences in float32, NaN as the lowest of all."""
    at = confidence.ptr + row * confidence.stride[0] + i.to(tl.int64) * confidence.stride[1]
    value = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _eligible(eligible, row, i, inside):
    at = eligible.ptr + row * eligible.stride[0] + i.to(tl.int64) * eligible.stride[1]
    return tl.load(at, mask=inside, other=0) != 0


# How many entries there are bounds masks; it is also the stride of `committed`, of bytes that are stored one by one.
@triton.jit(do_not_specialize=["entries"])
def commit_kernel(
    canvas, token, confidence, eligible, count, positions, committed, entries, OWN: tl.constexpr, OTHERS: tl.constexpr
):
    """One tile of entries against all of their row; grid (tiles of entries, B). The canvas is never read."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    inside = i < entries
    own = _confidence(confidence, row, i, inside)  # [I]
    rank = tl.zeros((OWN,), tl.int32)
    for first in tl.range(0, entries, OTHERS, num_stages=1):
        j = first + tl.arange(0, OTHERS)
        other = _confidence(confidence, row, j, j < entries)  # [J]
        above = other[None, :] > own[:, None]  # [I, J]
        level = (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        counted = (above | level) & _eligible(eligible, row, j, j < entries)[None, :]
        rank += tl.sum(counted.to(tl.int32), 1)
    chosen = rank < tl.load(count.ptr + row * count.stride[0])
    chosen = chosen & _eligible(eligible, row, i, inside)
    own_at = i.to(tl.int64)
    tl.store(committed + row * entries + own_at, chosen, mask=inside)
    slot = own_at
    if positions is not None:
        places = positions.ptr + row * positions.stride[0] + own_at * positions.stride[1]
        slot = tl.load(places, mask=chosen, other=0)
    value = tl.load(token.ptr + row * token.stride[0] + own_at * token.stride[1], mask=chosen, other=0)
    tl.store(canvas.ptr + row * canvas.stride[0] + slot * canvas.stride[1], value, mask=chosen)


@triton.jit(do_not_specialize=SIZES + [f"{name}_row" for name in ROWS])
def advance_kernel(
    tokens,
    masked,
    fresh,
    seen,
    rank,
    at,
    now,
    cut,
    invalid,
    table,
    active,
    scored,
    eligible,
    count,
    starts,
    token,
    confidence,
    score,
    entropy,
    ends,
    bounds,
    slots,
    entries,
    steps,
    ends_count,
    pad,
    bound,
    near,
    radius,
    table_row,
    tokens_row,
    masked_row,
    fresh_row,
    seen_row,
    rank_row,
    now_row,
    active_row,
    scored_row,
    eligible_row,
    INDEX: tl.constexpr,
    START: tl.constexpr,
    STOP: tl.constexpr,
    NEXT_BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RULE: tl.constexpr,
    FINITE_ONLY: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """What `advance_` of the reference does to one row; grid (B,)."""
    row = tl.program_id(0).to(tl.int64)
    tokens += row * tokens_row
    masked += row * masked_row
    fresh += row * fresh_row
    seen += row * seen_row
    rank += row * rank_row
    now += row * now_row
    active += row * active_row
    scored += row * scored_row
    if eligible is not None:
        eligible += row * eligible_row
    lane = tl.arange(0, OWN)
    # Whether the row is finished, and where its scored slots lie.
    masks_seen, low, high = tl.zeros((OWN,), tl.int32), tl.zeros((OWN,), tl.int32) + slots, tl.zeros((OWN,), tl.int32)
    for first in tl.range(0, slots, OWN, num_stages=1):
        slot = first + lane
        masks_seen += loaded(masked, 0, slot, slot < slots).to(tl.int32)
        scores = loaded(scored, 0, slot, slot < slots)
        low = tl.minimum(low, tl.where(scores, slot, slots))
        high = tl.maximum(high, tl.where(scores, slot + 1, 0))
    unfinished, low, high = tl.sum(masks_seen) > 0, tl.min(low), tl.max(high)
    begin = tl.load(starts + row).to(tl.int32)
    others = Scored(confidence, scored, eligible, entries, low, high, begin)
    wanted = tl.load(count + row)
    if (RULE == "threshold" or RULE == "near") and bounds is not None:
        bound = tl.load(bounds + row).to(tl.float32)
    if RULE != "fixed" and RULE != "near":
        sure = tl.zeros((OWN,), tl.int32)
        before = begin
        for first in tl.range(low, high, OWN, num_stages=1):
            slot = first + lane
            scores, may, entry = scored_entries(others, slot, slot < high, before, FINITE_ONLY)
            before += tl.sum(scores.to(tl.int32))
            known = level(confidence, entry, may, True)
            if RULE == "threshold":
                fulfils = known >= bound
            elif RULE == "factor":
                place = places(others, confidence, known, slot, OTHERS, True, FINITE_ONLY)
                fulfils = (place + 2).to(tl.float32) * -less_one(known) < bound
            else:
                own, spends = level(score, entry, may, False), nats(entropy, entry, may)
                total = spent(others, score, entropy, own, spends, slot, OTHERS, FINITE_ONLY, RULE == "entropy")
                fulfils = total <= bound
            sure += (may & fulfils).to(tl.int32)
        wanted = tl.maximum(wanted, tl.sum(sure))
    start, stop = tl.load(now + START), tl.load(now + STOP)
    before = begin
    open_left, unknown, ended, beyond_seen, nan = 0, 0, 0, 0, 0
    for first in tl.range(0, slots, OWN, num_stages=1):
        slot = first + lane
        inside = slot < slots
        masks = loaded(masked, 0, slot, inside)
        known_slots = loaded(seen, 0, slot, inside) | (loaded(active, 0, slot, inside) & (masks == 0))
        scores, may, entry = scored_entries(others, slot, inside, before, False)
        number = tl.sum(scores.to(tl.int32))
        before += number
        filled = may
        if number > 0:
            sureness = tl.load(confidence + entry, mask=scores, other=0.0).to(tl.float32)
            nan += tl.sum((sureness != sureness).to(tl.int32))
            own = level(score, entry, may, False)
            filled = places(others, score, own, slot, OTHERS, False, False) < wanted
            if RULE == "near":
                known = level(confidence, entry, may, True)
                reached = anchors(others, slot, bound, radius, OTHERS, FINITE_ONLY) > 0
                sure = (known >= bound) | (reached & (known >= near))
                if FINITE_ONLY:
                    sure = sure & (sureness > float("-inf"))
                filled = filled | sure
            filled = filled & may
        masks = masks & (filled == 0)
        value = tl.load(token + entry, mask=filled, other=0)
        written = filled
        place_of = tl.load(rank + slot, mask=inside, other=-1)
        open_left += tl.sum((masks & (place_of >= start) & (place_of < stop)).to(tl.int32))
        if ends is not None:
            # The first end that has no masked slot before it; a finished row has had its own.
            known = unknown + tl.cumsum(masks.to(tl.int32), 0) == 0
            candidate = known & inside & (place_of >= 0) & unfinished
            value += tl.load(tokens + slot, mask=candidate & (filled == 0), other=0)
            end = tl.zeros((OWN,), tl.int1)
            for i in tl.range(0, ends_count, num_stages=1):
                end = end | (value == tl.load(ends + i))
            end = (end & candidate).to(tl.int32)
            beyond = inside & (place_of >= 0) & (ended + tl.cumsum(end, 0) - end > 0)
            unknown += tl.sum(masks.to(tl.int32))
            ended += tl.sum(end)
            beyond_seen += tl.sum(beyond.to(tl.int32))
            value = tl.where(beyond, pad, value)
            written = written | beyond
            masks = masks & (beyond == 0)
            known_slots = known_slots & (beyond == 0)
        tl.store(tokens + slot, value, mask=written)
        tl.store(masked + slot, masks, mask=inside)
        tl.store(fresh + slot, filled, mask=inside)
        tl.store(seen + slot, known_slots, mask=inside)
    tl.store(invalid + row, True, mask=nan > 0)
    tl.store(cut + row, tl.load(cut + row) + beyond_seen, mask=beyond_seen > 0)
    following = tl.where(open_left > 0, tl.load(now + INDEX) + 1, tl.load(now + NEXT_BLOCK))
    following = tl.minimum(following, steps - 1)
    column = tl.arange(0, COLUMNS)
    fields = tl.load(table + row * table_row + following * FIELDS + column, mask=column < FIELDS, other=0)
    # All lanes have read the old step by now.
    tl.debug_barrier()
    tl.store(at + row, following, mask=unfinished)
    tl.store(now + column, fields, mask=(column < FIELDS) & unfinished)
