"""The kernel of head norms, rotation and the write into the buffer: one launch.

An entry r of a tile is one head of one token: token r // H, head r % H. The programs take the heads of Q, then those
of K, then those of V.
"""

import triton
import triton.language as tl

from dkv.kernels.common import stored

MOST, LEAST = tl.constexpr(stored.MOST), tl.constexpr(stored.LEAST)


@triton.jit
def _pairs(C):
    """Where the numbers that lane h holds stand in a head, [H] each: a pair that is rotated, or one that is kept."""
    h = tl.arange(0, C.BLOCK_H)
    first, second = h, h + C.D // 2
    if C.W != C.D // 2:
        first, second = tl.where(h < C.W, h, h + C.W), tl.where(h < C.W, h + C.W, second)
    return first, second


@triton.jit
def _halves(x, row, token, head, inside, C):
    """Both numbers of all pairs of the heads of x at `token` and `head` [R]: float32 [R, H] each."""
    h, pair = tl.arange(0, C.BLOCK_H), _pairs(C)
    at = x.ptr + row * x.stride[0] + token * x.stride[1] + head.to(tl.int64) * x.stride[2]
    mask = inside[:, None] & (h < C.D // 2)[None, :]
    first = tl.load(at[:, None] + pair[0][None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at[:, None] + pair[1][None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _norm_and_rotate(first, second, norm, cos, sin, place, inside, C, DTYPE: tl.constexpr):
    """The pairs after the norm, rounded where plain torch rounds, and the rotation at `place` [R]."""
    h, pair = tl.arange(0, C.BLOCK_H), _pairs(C)
    mask = inside[:, None] & (h < C.D // 2)[None, :]
    if norm.gain is not None:
        mean_square = tl.sum(first * first + second * second, 1) / C.D
        inverse = tl.rsqrt(mean_square + norm.eps)[:, None]
        first, second = (first * inverse).to(DTYPE).to(tl.float32), (second * inverse).to(DTYPE).to(tl.float32)
        first *= tl.load(norm.gain + pair[0], mask=h < C.D // 2, other=0.0).to(tl.float32)[None, :]
        second *= tl.load(norm.gain + pair[1], mask=h < C.D // 2, other=0.0).to(tl.float32)[None, :]
        first, second = first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)
    if C.W != C.D // 2:
        mask = mask & (h < C.W)[None, :]
    c = tl.load(cos.ptr + (place * cos.stride[0])[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin.ptr + (place * sin.stride[0])[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    left, right = first * c - second * s, second * c + first * s
    if C.W != C.D // 2:
        left, right = tl.where((h < C.W)[None, :], left, first), tl.where((h < C.W)[None, :], right, second)
    return left, right


@triton.jit
def _write(buffer, row, slot, head, first, second, inside, C, DTYPE: tl.constexpr):
    """All pairs into one row or rows [R] of a buffer, at `slot` and `head` [R]; rounded to DTYPE before its dtype.

    In 8 bits as `dkv.kernels.common.stored.rounded` says.
    """
    h, pair = tl.arange(0, C.BLOCK_H), _pairs(C)
    mask, stride = inside[:, None] & (h < C.D // 2)[None, :], buffer.numbers.stride
    at = buffer.numbers.ptr + (row * stride[0] + slot * stride[1] + head.to(tl.int64) * stride[2])[:, None]
    own: tl.constexpr = buffer.numbers.ptr.dtype.element_ty
    first, second = first.to(DTYPE), second.to(DTYPE)
    if buffer.scales is not None:
        first, second = first.to(tl.float32), second.to(tl.float32)
        scale = tl.maximum(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1) / MOST, LEAST)
        # A maximum passes over NaN. The nearest bfloat16, as the interpreter cuts bits off where it casts.
        scale = scale + tl.sum(first * 0.0 + second * 0.0, 1)
        scale = ((scale.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
        stride = buffer.scales.stride
        scale_at = buffer.scales.ptr + row * stride[0] + slot * stride[1] + head.to(tl.int64) * stride[2]
        tl.store(scale_at, scale.to(tl.bfloat16), mask=inside)
        inverse = 1.0 / scale
        first, second = _nearest(first * inverse[:, None]), _nearest(second * inverse[:, None])
    stride = buffer.numbers.stride
    tl.store(at + pair[0].to(tl.int64)[None, :] * stride[3], first.to(own), mask=mask)
    tl.store(at + pair[1].to(tl.int64)[None, :] * stride[3], second.to(own), mask=mask)


@triton.jit
def _nearest(x):
    """The nearest whole numbers; a cast goes towards zero."""
    return tl.where(x < 0.0, x - 0.5, x + 0.5).to(tl.int32)


NOT_SPECIALIZED = ["positions", "positions_stride", "rows", "query_positions", "query_positions_stride"]
NOT_SPECIALIZED += ["query_tokens", "tokens"]


# Counts that only bound masks, and places of indices, are compiled for any number, so that another length needs no
# other kernel.
@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def rope_scatter_kernel(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    positions_stride,
    rows,
    query_positions,
    query_positions_stride,
    k_buf,
    v_buf,
    out,
    q_norm,
    k_norm,
    query_tokens,
    tokens,
    C,
):
    """One tile of heads of Q, K or V; grid (tiles of Q, then of K, then of V; B).

    Packed entries are read as those of one row, and written to the rows that `rows` names. The indices of a row are
    dense; the strides are those between rows.

    C is known at compile time: HQ and HKV heads of D numbers, of which the first 2 * W are rotated, and tiles of
    ENTRIES heads by BLOCK_H numbers of a half.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    DTYPE: tl.constexpr = out.dtype.element_ty
    h, r = tl.arange(0, C.BLOCK_H), tl.arange(0, C.ENTRIES)
    query_tiles, key_tiles = tl.cdiv(query_tokens * C.HQ, C.ENTRIES), tl.cdiv(tokens * C.HKV, C.ENTRIES)
    if tile < query_tiles:
        r += tile * C.ENTRIES
        token, head = (r // C.HQ).to(tl.int64), r % C.HQ
        asked = token < query_tokens
        place = tl.load(query_positions + row * query_positions_stride + token, mask=asked, other=0)
        first, second = _halves(q, row, token, head, asked, C)
        first, second = _norm_and_rotate(first, second, q_norm, cos, sin, place, asked, C, DTYPE)
        out_at, pair = out + ((row * query_tokens * C.HQ + r) * C.D)[:, None], _pairs(C)
        mask = asked[:, None] & (h < C.D // 2)[None, :]
        tl.store(out_at + pair[0][None, :], first.to(DTYPE), mask=mask)
        tl.store(out_at + pair[1][None, :], second.to(DTYPE), mask=mask)
    else:
        rest = tile - query_tiles
        r += tl.where(rest < key_tiles, rest, rest - key_tiles) * C.ENTRIES
        token, head = (r // C.HKV).to(tl.int64), r % C.HKV
        wanted = token < tokens
        slot, to = tl.load(positions + row * positions_stride + token, mask=wanted, other=0), row
        if rows is not None:
            to = tl.load(rows + token, mask=wanted, other=0)
        if rest < key_tiles:
            first, second = _halves(k, row, token, head, wanted, C)
            first, second = _norm_and_rotate(first, second, k_norm, cos, sin, slot, wanted, C, DTYPE)
            _write(k_buf, to, slot, head, first, second, wanted, C, DTYPE)
        else:
            first, second = _halves(v, row, token, head, wanted, C)
            _write(v_buf, to, slot, head, first, second, wanted, C, DTYPE)
