"""The kernels of attention.

The query heads of one key head are packed into the M entries of a tile: entry m of key head h is token
m // GROUP, query head h * GROUP + m % GROUP. Where queries are few, the keys are divided among
several programs, and a second kernel merges their partial results.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(at, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, 0 where a mask that applies does not hold; no predicates for one that does not apply."""
    if ROWS and COLUMNS:
        tile = tl.load(at, mask=rows & columns, other=0.0)
    elif ROWS:
        tile = tl.load(at, mask=rows, other=0.0)
    elif COLUMNS:
        tile = tl.load(at, mask=columns, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _absorb(
    acc, top, total, met, q, k, v, key_mask, mask, mask_row, key_blocks, query_block, first, start, stop, scale,
    stride_ks, stride_vs, stride_km, stride_ms, stride_kb,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """Add the slots `first` to `first + BLOCK_N - 1` to the running softmax of a tile of queries.

    FINITE: values that are not finite count as 0, and `met` [M, D] counts those that a query sees.
    """
    # Scalars carry the 64-bit part of an offset; within a tile 32 bits do, unless a stride is enormous.
    n, d, first = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.cast(first, tl.int64)
    if WIDE:
        n = n.to(tl.int64)
    seen = (n >= start - first) & (n < stop - first)  # [N]; on an edge alone not all true
    k_at = k + first * stride_ks + (n[None, :] * stride_ks + d[:, None])
    key = _load(k_at, seen[None, :], (d < D)[:, None], EDGE, D != BLOCK_D)  # [D, N]
    scores = tl.dot(q, key, input_precision=PRECISION) * scale  # [M, N]
    if mask is not None:
        mask_at = mask + first * stride_ms + (mask_row[:, None] + n[None, :] * stride_ms)
        allowed = tl.load(mask_at, mask=seen[None, :], other=0)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    if key_blocks is not None:
        key_block = tl.load(key_blocks + first * stride_kb + n * stride_kb, mask=seen, other=0).to(tl.int32)
        scores = tl.where(key_block[None, :] <= query_block[:, None], scores, float("-inf"))
    if key_mask is not None:
        seen = seen & (tl.load(key_mask + first * stride_km + n * stride_km, mask=seen, other=0) != 0)
    if EDGE:
        scores = tl.where(seen[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))  # [M]
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight, keep = tl.exp2(scores - shift[:, None]), tl.exp2(top - shift)
    # What a hidden slot holds is not read: 0 times NaN is NaN.
    v_at = v + first * stride_vs + (n[:, None] * stride_vs + d[None, :])
    value = _load(v_at, seen[:, None], (d < D)[None, :], EDGE, D != BLOCK_D)  # [N, D]
    if FINITE:
        finite = tl.abs(value) < float("inf")
        sees, strange = tl.where(scores != float("-inf"), 1.0, 0.0), tl.where(finite, 0.0, 1.0)
        met = tl.dot(sees.to(value.dtype), strange.to(value.dtype), met, input_precision=PRECISION)
        value = tl.where(finite, value, 0.0)
    acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None], input_precision=PRECISION)
    return acc, highest, total * keep + tl.sum(weight, 1), met


@triton.jit
def attention_kernel(
    q, k, v, out, lse, lengths, ranges, key_mask, mask, query_blocks, key_blocks, scale, tokens, slots,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_lb, stride_rb, stride_re, stride_kmb, stride_kms, stride_mb, stride_mn, stride_ms,
    stride_qbb, stride_qbn, stride_kbb, stride_kbs,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TESTED: tl.constexpr, REPAIR: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of packed queries over one part of the slots; grid (tiles of queries x SPLITS, Hkv, B).

    A value that is hidden from some queries of a tile alone has the weight 0 there, and 0 times NaN is NaN. REPAIR:
    where a tile of `out` is not finite, compute it again without such values, but for numbers of which one is seen.
    """
    query_tile, split = tl.program_id(0) // SPLITS, (tl.program_id(0) % SPLITS).to(tl.int64)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m, d = query_tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, member = m // GROUP, m % GROUP  # [M]
    length = tokens
    if lengths is not None:
        length = tl.minimum(tokens, tl.load(lengths + row * stride_lb)).to(tl.int32)
    asked = token < length
    q += row * stride_qb + head * GROUP * stride_qh
    q_at = q + token.to(tl.int64)[:, None] * stride_qn + member.to(tl.int64)[:, None] * stride_qh + d[None, :]
    query = tl.load(q_at, mask=asked[:, None] & (d < D)[None, :], other=0.0)

    # The slots of this part that are in the range of the row.
    part = tl.cdiv(tl.cdiv(slots, BLOCK_N), SPLITS) * BLOCK_N
    start, stop = split * part, tl.minimum(slots, (split + 1) * part)
    if ranges is not None:
        start = tl.maximum(start, tl.load(ranges + row * stride_rb))
        stop = tl.minimum(stop, tl.load(ranges + row * stride_rb + stride_re))
    if query_tile * BLOCK_M >= length * GROUP:
        stop = start
    stop = tl.maximum(start, stop)
    k, v = k + row * stride_kb + head * stride_kh, v + row * stride_vb + head * stride_vh
    if key_mask is not None:
        key_mask += row * stride_kmb
    mask_row, query_block = m, m
    if mask is not None:
        first_token = query_tile * BLOCK_M // GROUP
        mask += row * stride_mb + first_token.to(tl.int64) * stride_mn
        mask_row = tl.where(asked, token - first_token, 0)
        mask_row = (mask_row.to(tl.int64) if WIDE else mask_row) * stride_mn
    if key_blocks is not None:
        query_blocks += row * stride_qbb + token.to(tl.int64) * stride_qbn
        query_block = tl.load(query_blocks, mask=asked, other=0).to(tl.int32)
        key_blocks += row * stride_kbb

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, met = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_D if REPAIR else 1), tl.float32)
    # Whole tiles in a pipelined loop that does not test the range, then the one or two at its ends. Where
    # every tile is tested there is one loop, as one takes fewer registers than two.
    before, whole, after = start // BLOCK_N, tl.cdiv(start, BLOCK_N), stop // BLOCK_N
    first, last = (before, tl.cdiv(stop, BLOCK_N)) if TESTED else (whole, after)
    if REPAIR:
        at = ((row * tokens + token) * tl.num_programs(1) * GROUP + head * GROUP + member) * SPLITS + split
        found = tl.load(out + at[:, None] * D + d[None, :], mask=asked[:, None] & (d < D)[None, :], other=0.0)
        strange = tl.max(tl.max(tl.where(tl.abs(found) < float("inf"), 0, 1), 1), 0)
        last = tl.where(strange > 0, last, first)
    for tile in tl.range(first, last, num_stages=STAGES):
        acc, top, total, met = _absorb(
            acc, top, total, met, query, k, v, key_mask, mask, mask_row, key_blocks, query_block, tile * BLOCK_N, start,
            stop, scale, stride_ks, stride_vs, stride_kms, stride_ms, stride_kbs,
            D, BLOCK_D, BLOCK_N, TESTED, WIDE, PRECISION, REPAIR,
        )  # fmt: skip
    if not TESTED:
        has_tail = (after * BLOCK_N < stop) & ((after > before) | (whole == before))
        for end in tl.range(tl.where(before < whole, 0, 1), tl.where(has_tail, 2, 1), num_stages=1):
            acc, top, total, met = _absorb(
                acc, top, total, met, query, k, v, None, None, mask_row, None, query_block,
                tl.where(end == 0, before, after) * BLOCK_N, start, stop, scale, stride_ks, stride_vs, 0, 0, 0,
                D, BLOCK_D, BLOCK_N, True, WIDE, PRECISION, False,
            )  # fmt: skip

    # A query that sees nothing, or is not asked, gives 0 and -inf. NaN is not nothing.
    total = tl.where(asked, total, 0.0)
    acc = tl.where(total[:, None] != 0.0, acc / tl.where(total != 0.0, total, 1.0)[:, None], 0.0)
    log_total = tl.where(total != 0.0, (top + tl.log2(tl.where(total != 0.0, total, 1.0))) * LN2, float("-inf"))
    at = ((row * tokens + token) * tl.num_programs(1) * GROUP + head * GROUP + member) * SPLITS + split
    inside = token < tokens
    stored = inside[:, None] & (d < D)[None, :]
    if REPAIR:
        stored = stored & (asked[:, None] & (strange > 0) & (met == 0.0))
    tl.store(out + at[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=stored)
    if lse is not None and not REPAIR:
        tl.store(lse + at, log_total, mask=inside)


@triton.jit
def merge_kernel(
    part, part_lse, out, lse, rows, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """The outputs of the parts, weighted by their share of the softmax; grid (tiles of rows,)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    inside = r < rows
    own = tl.load(part_lse + r[:, None] * SPLITS + split[None, :], mask=inside[:, None], other=float("-inf"))  # [R, P]
    top = tl.max(own, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((own - shift[:, None]) * LOG2E)
    total = tl.sum(weight, 1)
    total = tl.where(total == 0.0, 1.0, total)  # of no part
    share = weight / total[:, None]
    at = (r[:, None, None] * SPLITS + split[None, :, None]) * D + d[None, None, :]
    value = tl.load(part + at, mask=inside[:, None, None] & (d < D)[None, None, :], other=0.0)  # [R, P, D]
    merged = tl.sum(value * share[:, :, None], 1).to(out.dtype.element_ty)
    tl.store(out + r[:, None] * D + d[None, :], merged, mask=inside[:, None] & (d < D)[None, :])
    if lse is not None:
        log_total = tl.where(tl.abs(top) == float("inf"), top, shift + tl.log(total))
        tl.store(lse + r, log_total, mask=inside)
