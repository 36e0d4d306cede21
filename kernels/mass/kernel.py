"""The kernels of the attention that slots get.

A program owns a tile of slots of a row and sweeps the queries of the row, key head after key head: no two programs add
to one number. Where tiles of slots are few, the sweep is divided among several programs, and a second kernel adds up
what they found.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# What only bounds masks and loops is compiled for any number, so that another length needs no other kernel.
@triton.jit(do_not_specialize=["slots", "parts"])
def mass_kernel(q, k, key_scales, lse, weight, out, rows, scale, slots, parts, C):
    """What a part of the queries gives to a tile of slots; grid (tiles of slots, parts, B); out [B, parts, slots].

    `scale` is for powers of 2. The query heads of a key head share the M entries of a tile, as in attention.

    C is known at compile time. HEADS: key heads. GROUP: query heads of each. WIDE: an offset within a tile may need 64
    bits. PRECISION: how float32 is multiplied. The tile is BLOCK_M queries, BLOCK_N slots, BLOCK_D numbers of the D of
    a head.
    """
    first, part, row = tl.program_id(0) * C.BLOCK_N, tl.program_id(1), tl.program_id(2).to(tl.int64)
    m, n, d = tl.arange(0, C.BLOCK_M), tl.arange(0, C.BLOCK_N), tl.arange(0, C.BLOCK_D)
    length = tl.load(rows.query_lengths.ptr + row * rows.query_lengths.stride[0]).to(tl.int32)
    before = tl.load(rows.query_starts.ptr + row * rows.query_starts.stride[0]).to(tl.int64)
    inside = first + n < slots
    seen = inside
    if rows.key_ranges is not None:
        range_at = rows.key_ranges.ptr + row * rows.key_ranges.stride[0]
        start, stop = tl.load(range_at), tl.load(range_at + rows.key_ranges.stride[1])
        seen = inside & (first + n >= start) & (first + n < stop)

    # The sweep: tiles of queries of key head 0, then those of head 1, and so on; this part of them. It follows from
    # the row alone, so that a sum has the same order whatever stands beside the row.
    tiles = tl.cdiv(length * C.GROUP, C.BLOCK_M)
    share = tl.cdiv(tiles * C.HEADS, parts)
    begin, end = part * share, tl.minimum((part + 1) * share, tiles * C.HEADS)
    # No slot of the tile is visible: nothing is read.
    end = tl.where(tl.max(seen.to(tl.int32), 0) > 0, end, begin)
    apart = n.to(tl.int64) if C.WIDE else n
    k_at = k.ptr + row * k.stride[0] + tl.cast(first, tl.int64) * k.stride[1]
    k_at += apart[:, None] * k.stride[1] + d[None, :]
    there = seen[:, None] & (d < C.D)[None, :]
    mass = tl.zeros((C.BLOCK_N,), tl.float32)
    for step in tl.range(begin, end, num_stages=C.STAGES):
        head, tile = step // tiles, step % tiles
        entry = tile * C.BLOCK_M + m
        # Scalars carry the 64-bit part of an offset.
        token = tile * C.BLOCK_M // C.GROUP
        near, member, asked = entry // C.GROUP - token, entry % C.GROUP, entry < length * C.GROUP
        if C.WIDE:
            near, member = near.to(tl.int64), member.to(tl.int64)
        token, of_head = before + token, tl.cast(head, tl.int64)
        q_at = q.ptr + (token * q.stride[0] + of_head * C.GROUP * q.stride[1])
        q_at += (near * q.stride[0] + member * q.stride[1])[None, :] + d[:, None]
        query = tl.load(q_at, mask=asked[None, :] & (d < C.D)[:, None], other=0.0)  # [D, M]
        key = tl.load(k_at + of_head * k.stride[2], mask=there, other=0.0)  # [N, D]
        lse_at = lse.ptr + (token * lse.stride[0] + of_head * C.GROUP * lse.stride[1])
        total = tl.load(lse_at + near * lse.stride[0] + member * lse.stride[1], mask=asked, other=float("inf"))
        # A query that saw nothing gives nothing.
        total = tl.where(total == float("-inf"), float("inf"), total)
        own = tl.load(weight.ptr + token * weight.stride[0] + near * weight.stride[0], mask=asked, other=0.0)
        scores = tl.dot(key.to(query.dtype), query, input_precision=C.PRECISION)  # [N, M]
        if key_scales is not None:
            scales_at = key_scales.ptr + row * key_scales.stride[0] + tl.cast(first, tl.int64) * key_scales.stride[1]
            scales_at += of_head * key_scales.stride[2] + apart * key_scales.stride[1]
            scores *= tl.load(scales_at, mask=seen, other=0.0).to(tl.float32)[:, None]
        mass += tl.sum(tl.exp2(scores * scale - (total * LOG2E)[None, :]) * own[None, :], 1)
    mass = tl.where(seen, mass * (1.0 / (C.HEADS * C.GROUP)), 0.0)
    tl.store(out + (row * parts + part) * slots + first + n, mass, mask=inside)


@triton.jit(do_not_specialize=["slots", "parts"])
def total_kernel(part, out, slots, parts, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of part [B, parts, slots] over the parts; grid (tiles of slots, B)."""
    slot, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    number = tl.arange(0, BLOCK_P)
    there = (number < parts)[:, None] & (slot < slots)[None, :]
    found = tl.load(part + row * parts * slots + number[:, None] * slots + slot[None, :], mask=there, other=0.0)
    tl.store(out + row * slots + slot, tl.sum(found, 0), mask=slot < slots)
