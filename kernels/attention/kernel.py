"""The kernels of attention.

The query heads of one key head share the M entries of a tile: entry m of key head h is token
m // GROUP, query head h * GROUP + m % GROUP. Where queries are few, the keys are divided among
several programs, and a second kernel merges their partial results.
"""

import triton
import triton.language as tl

from dkv.kernels.attention.gap import count, numbered, part_around_gap, tiles
from dkv.kernels.common.arguments import Strided
from dkv.kernels.common.stored import Stored

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Weights are multiplied by the scales of values in 8 bits, and by this, so that they stay as far from underflow in
# float16 as without. A power of 2, which costs no accuracy.
LARGE = tl.constexpr(128.0)


@triton.jit
def _load(at, entries, columns, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, 0 where a mask that applies does not hold; no predicates for one that does not apply."""
    if ENTRIES and COLUMNS:
        tile = tl.load(at, mask=entries & columns, other=0.0)
    elif ENTRIES:
        tile = tl.load(at, mask=entries, other=0.0)
    elif COLUMNS:
        tile = tl.load(at, mask=columns, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _absorb(state, query, mask_m, limit, k, v, rules, row, first_token, first, bounds, scale, C, EDGE: tl.constexpr):
    """Add the slots `first` to `first + BLOCK_N - 1` to the running softmax of a tile of queries.

    `bounds` are `start` and `stop`, and the same of a gap if there is one. EDGE: some slots may be outside of these, in
    the gap, or behind the end of a query. `limit` [M]: the end, or the block, of each query. REPAIR: values that are
    not finite count as 0, and `met` [M, D] counts those that a query sees.
    """
    acc, top, total, met = state
    # Scalars carry the 64-bit part of an offset; within a tile 32 bits do, unless a stride is enormous.
    n, d = tl.arange(0, C.BLOCK_N), tl.arange(0, C.BLOCK_D)
    if C.WIDE:
        n = n.to(tl.int64)
    seen = (n >= bounds[0] - first) & (n < bounds[1] - first)  # [N]; on an edge alone not all true
    if rules.key_gaps is not None:
        seen = seen & ((n < bounds[2] - first) | (n >= bounds[3] - first))
    first = tl.cast(first, tl.int64)
    of_slots = k.numbers.stride[1]
    k_at = k.numbers.ptr + first * of_slots + (n[None, :] * of_slots + d[:, None])
    key = _load(k_at, seen[None, :], (d < C.D)[:, None], EDGE, C.D != C.BLOCK_D)  # [D, N]
    scores = tl.dot(query, key.to(query.dtype), input_precision=C.PRECISION)  # [M, N]
    if k.scales is not None:
        scores = scores * _scales(k.scales, first, n, seen, EDGE)[None, :]
    if rules.mask is not None:
        of_mask, stride = rules.mask.ptr, rules.mask.stride
        of_mask += row * stride[0] + first_token.to(tl.int64) * stride[1] + first * stride[2]
        allowed = tl.load(of_mask + (mask_m[:, None] + n[None, :] * stride[2]), mask=seen[None, :], other=0)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    if rules.key_blocks is not None:
        key_block = _of_slots(rules.key_blocks, row, first, n, seen).to(tl.int32)
        scores = tl.where(key_block[None, :] <= limit[:, None], scores, float("-inf"))
    if rules.key_mask is not None:
        seen = seen & (_of_slots(rules.key_mask, row, first, n, seen) != 0)
    if EDGE:
        if rules.query_ends is not None:
            scores = tl.where(n[None, :] < (limit - first.to(tl.int32))[:, None], scores, float("-inf"))
        scores = tl.where(seen[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1) * scale)  # [M]
    # Scores are scaled and shifted in one instruction, and their maximum alone is scaled before. -inf is not subtracted
    # as all weights would be NaN, infinity as those of scores that only the scale makes infinite would be 0.
    shift = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    weight, keep = tl.exp2(scores * scale - shift[:, None]), tl.exp2(top - shift)
    # What a hidden slot holds is not read: 0 times NaN is NaN.
    of_slots = v.numbers.stride[1]
    v_at = v.numbers.ptr + first * of_slots + (n[:, None] * of_slots + d[None, :])
    value = _load(v_at, seen[:, None], (d < C.D)[None, :], EDGE, C.D != C.BLOCK_D).to(query.dtype)  # [N, D]
    if C.REPAIR:
        finite = tl.abs(value) < float("inf")
        sees, strange = tl.where(scores != float("-inf"), 1.0, 0.0), tl.where(finite, 0.0, 1.0)
        met = tl.dot(sees.to(value.dtype), strange.to(value.dtype), met, input_precision=C.PRECISION)
        value = tl.where(finite, value, 0.0)
    sum_of_weights = tl.sum(weight, 1)
    if v.scales is not None:
        weight = weight * (_scales(v.scales, first, n, seen, EDGE) * LARGE)[None, :]
        if EDGE:  # As whole numbers are finite, this is all that NaN needs.
            weight = tl.where(scores == float("-inf"), 0.0, weight)
    acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None], input_precision=C.PRECISION)
    return acc, highest, total * keep + sum_of_weights, met


@triton.jit
def _scales(x, first, n, seen, EDGE: tl.constexpr):
    """The scales [N] of the slots first + n."""
    at = x.ptr + first * x.stride[1] + n * x.stride[1]
    return _load(at, seen, seen, EDGE, False).to(tl.float32)


@triton.jit
def _of_head(x, row, head):
    """What a buffer has of a head of a row: numbers [S, D], and scales [S]."""
    stride = x.numbers.stride
    numbers, scales = Strided(x.numbers.ptr + row * stride[0] + head * stride[2], stride), x.scales
    if x.scales is not None:
        stride = x.scales.stride
        scales = Strided(x.scales.ptr + row * stride[0] + head * stride[2], stride)
    return Stored(numbers, scales)


@triton.jit
def _of_slots(x, row, first, n, seen):
    """Numbers of x [B, S] for the slots first + n of a row."""
    return tl.load(x.ptr + (row * x.stride[0] + first * x.stride[1]) + n * x.stride[1], mask=seen, other=0)


@triton.jit
def _entry(token, head, member, split, splits, C):
    """The place [M] of a query's part in [B, N, Hq, splits], or packed [T, Hq, splits], by its token of all rows."""
    return (token * tl.num_programs(1) * C.GROUP + head * C.GROUP + member) * splits + split


# What only bounds masks and loops is compiled for any number, so that another length needs no other kernel.
@triton.jit(do_not_specialize=["tokens", "slots", "splits"])
def attention_kernel(q, k, v, out, lse, rules, scale, tokens, slots, splits, C):
    """One tile of queries over one part of the slots; grid (tiles of queries x splits, Hkv, B).

    A row has `tokens` queries at most. `splits` are the programs that the slots are divided among.

    A value that is hidden from some queries of a tile alone has the weight 0 there, and 0 times NaN is NaN. REPAIR:
    where a tile of `out` is not finite, compute it again without such values, but for numbers of which one is seen.

    `scale` is positive, and for powers of 2.

    C is known at compile time. GROUP: query heads of a key head. TESTED: every tile of slots is held against the rules,
    as must be with a gap, and not only those at an end of the range. WIDE: an offset within a tile may need 64 bits.
    PRECISION: how float32 is multiplied. A tile is BLOCK_M queries, BLOCK_N slots, BLOCK_D numbers of the D of a head.
    """
    query_tile, split = tl.program_id(0) // splits, (tl.program_id(0) % splits).to(tl.int64)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m, d = query_tile * C.BLOCK_M + tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_D)
    token, member = m // C.GROUP, m % C.GROUP  # [M]
    length = tokens
    if rules.query_lengths is not None:
        length = tl.minimum(tokens, tl.load(rules.query_lengths.ptr + row * rules.query_lengths.stride[0])).to(tl.int32)
    asked = token < length
    # Where the queries of the row start: in memory, and counted over all rows.
    q_at, before = q.ptr + row * q.stride[0], row * tokens
    if rules.query_starts is not None:
        before = tl.load(rules.query_starts.ptr + row * rules.query_starts.stride[0]).to(tl.int64)
        q_at = q.ptr + before * q.stride[1]
    q_at += head * C.GROUP * q.stride[2]
    q_at += token.to(tl.int64)[:, None] * q.stride[1] + member.to(tl.int64)[:, None] * q.stride[2] + d[None, :]
    query = tl.load(q_at, mask=asked[:, None] & (d < C.D)[None, :], other=0.0)

    # The slots of this part that are in the range of the row. All slots are divided, or with a gap those of the row.
    part = tl.cdiv(tl.cdiv(slots, C.BLOCK_N), splits) * C.BLOCK_N
    start, stop = split * part, tl.minimum(slots, (split + 1) * part)
    if rules.key_gaps is not None:
        start, stop = tl.cast(0, tl.int64), tl.cast(slots, tl.int64)
    if rules.key_ranges is not None:
        range_at = rules.key_ranges.ptr + row * rules.key_ranges.stride[0]
        start = tl.maximum(start, tl.load(range_at))
        stop = tl.minimum(stop, tl.load(range_at + rules.key_ranges.stride[1]))
    if query_tile * C.BLOCK_M >= length * C.GROUP:
        stop = start
    limit, lowest = m, stop
    if rules.query_ends is not None:
        end = tl.load(rules.query_ends.ptr + (before + token) * rules.query_ends.stride[0], mask=asked, other=0)
        limit = tl.maximum(tl.minimum(end, slots), 0).to(tl.int32)
        # In 32 bits, as numbers of 64 would cost registers.
        start = tl.minimum(start, slots).to(tl.int32)
        lowest = tl.maximum(start, tl.minimum(stop, tl.min(tl.where(asked, limit, slots), 0))).to(tl.int32)
        stop = tl.maximum(start, tl.minimum(stop, tl.max(limit, 0))).to(tl.int32)
    stop = tl.maximum(start, stop)
    bounds = (start, stop)
    if rules.key_gaps is not None:
        gap_at = rules.key_gaps.ptr + row * rules.key_gaps.stride[0]
        hidden, shown = tl.load(gap_at), tl.load(gap_at + rules.key_gaps.stride[1])
        start, stop = tl.minimum(start, slots), tl.minimum(stop, slots)
        bounds = part_around_gap(start, stop, hidden, shown, split, splits, C.BLOCK_N)
    k, v = _of_head(k, row, head), _of_head(v, row, head)
    first_token, mask_m = query_tile * C.BLOCK_M // C.GROUP, m
    if rules.mask is not None:
        mask_m = tl.where(asked, token - first_token, 0)
        mask_m = (mask_m.to(tl.int64) if C.WIDE else mask_m) * rules.mask.stride[1]
    if rules.key_blocks is not None:
        block_at = rules.query_blocks.ptr + row * rules.query_blocks.stride[0]
        block_at += token.to(tl.int64) * rules.query_blocks.stride[1]
        limit = tl.load(block_at, mask=asked, other=0).to(tl.int32)

    top, total = tl.full((C.BLOCK_M,), float("-inf"), tl.float32), tl.zeros((C.BLOCK_M,), tl.float32)
    met = tl.zeros((C.BLOCK_M, C.BLOCK_D if C.REPAIR else 1), tl.float32)
    state = tl.zeros((C.BLOCK_M, C.BLOCK_D), tl.float32), top, total, met
    # Whole tiles in a pipelined loop that does not test the range, then the one or two at its ends, and those that some
    # of the queries see, and others do not. Where every tile is tested there is one loop, as one takes fewer registers
    # than two.
    least, whole, after = start // C.BLOCK_N, tl.cdiv(start, C.BLOCK_N), stop // C.BLOCK_N
    if rules.query_ends is not None:
        after = tl.maximum(lowest // C.BLOCK_N, whole)
    first, last = (least, tl.cdiv(stop, C.BLOCK_N)) if C.TESTED else (whole, after)
    if rules.key_gaps is not None:
        walk = tiles(*bounds, C.BLOCK_N)
        first, last = walk[0], walk[0] + count(walk)
    if C.REPAIR:
        at = _entry(before + token, head, member, split, splits, C)
        found = tl.load(out + at[:, None] * C.D + d[None, :], mask=asked[:, None] & (d < C.D)[None, :], other=0.0)
        strange = tl.max(tl.max(tl.where(tl.abs(found) < float("inf"), 0, 1), 1), 0)
        last = tl.where(strange > 0, last, first)
    for tile in tl.range(first, last, num_stages=C.STAGES):
        slot = tile * C.BLOCK_N
        if rules.key_gaps is not None:  # no branch around the loads, which are in flight some tiles ahead
            slot = numbered(tile, walk) * C.BLOCK_N
        state = _absorb(state, query, mask_m, limit, k, v, rules, row, first_token, slot, bounds, scale, C, C.TESTED)
    if not C.TESTED:
        has_tail = (after * C.BLOCK_N < stop) & ((after > least) | (whole == least))
        begin, finish = tl.where(least < whole, 0, 1), tl.where(has_tail, 2, 1)
        if rules.query_ends is not None:
            finish = 1 + tl.maximum(tl.cdiv(stop, C.BLOCK_N) - after, 0)
        for end in tl.range(begin, finish, num_stages=1):
            slot = tl.where(end == 0, least, after) * C.BLOCK_N
            if rules.query_ends is not None:
                slot = tl.where(end == 0, least, after + end - 1) * C.BLOCK_N
            state = _absorb(state, query, mask_m, limit, k, v, rules, row, first_token, slot, bounds, scale, C, True)

    # A query that sees nothing, or is not asked, gives 0 and -inf. NaN is not nothing. Behind the queries of a packed
    # row stand those of another.
    acc, top, total, met = state
    if v.scales is not None:
        acc = acc * (1.0 / LARGE)
    total = tl.where(asked, total, 0.0)
    acc = tl.where(total[:, None] != 0.0, acc / tl.where(total != 0.0, total, 1.0)[:, None], 0.0)
    log_total = tl.where(total != 0.0, (top + tl.log2(tl.where(total != 0.0, total, 1.0))) * LN2, float("-inf"))
    at, inside = _entry(before + token, head, member, split, splits, C), token < tokens
    if rules.query_starts is not None:
        inside = asked
    stored = inside[:, None] & (d < C.D)[None, :]
    if C.REPAIR:
        stored = stored & (asked[:, None] & (strange > 0) & (met == 0.0))
    tl.store(out + at[:, None] * C.D + d[None, :], acc.to(out.dtype.element_ty), mask=stored)
    if lse is not None and not C.REPAIR:
        tl.store(lse + at, log_total, mask=inside)


@triton.jit(do_not_specialize=["entries", "splits"])
def merge_kernel(
    part,
    part_lse,
    out,
    lse,
    entries,
    splits,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The outputs of the parts, weighted by their share of the softmax; grid (tiles of entries [B * N * Hq],)."""
    r = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    split, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    inside, wanted = r < entries, (d < D)[None, :]
    there, at = inside[:, None] & (split < splits)[None, :], r[:, None] * splits + split[None, :]  # [R, P]
    own = tl.load(part_lse + at, mask=there, other=float("-inf"))
    top = tl.max(own, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((own - shift[:, None]) * LOG2E)
    total = tl.sum(weight, 1)
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    share = weight / total[:, None]
    value_at = part + at[:, :, None] * D + d[None, None, :]
    value = tl.load(value_at, mask=there[:, :, None] & wanted[None, :, :], other=0.0)  # [R, P, D]
    merged = tl.sum(value * share[:, :, None], 1).to(out.dtype.element_ty)
    tl.store(out + r[:, None] * D + d[None, :], merged, mask=inside[:, None] & wanted)
    if lse is not None:
        # The largest of NaN and -inf is -inf: a sum that is NaN says that there was one.
        log_total = tl.where(nothing | (top == float("inf")), top, shift + tl.log(total))
        tl.store(lse + r, log_total, mask=inside)
