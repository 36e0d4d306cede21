"""The kernel of head norms, rotation and the write into the buffer: one launch.

An entry r of a tile is one head of one token: token r // H, head r % H. The programs take the heads of Q, then those
of K, then those of V.
"""

import triton
import triton.language as tl


@triton.jit
def _halves(x_at, inside, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both halves of the heads at `x_at` [R]: float32 [R, H] each."""
    h = tl.arange(0, BLOCK_H)
    mask = inside[:, None] & (h < HALF)[None, :]
    first = tl.load(x_at[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_at[:, None] + (HALF + h)[None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _norm_and_rotate(
    first, second, gain, eps, cos, sin, place, inside, stride_cp, stride_sp,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The halves after the norm, rounded where plain torch rounds, and the rotation at `place` [R]."""
    h = tl.arange(0, BLOCK_H)
    mask = inside[:, None] & (h < HALF)[None, :]
    if gain is not None:
        mean_square = tl.sum(first * first + second * second, 1) / (2 * HALF)
        inverse = tl.rsqrt(mean_square + eps)[:, None]
        first, second = (first * inverse).to(DTYPE).to(tl.float32), (second * inverse).to(DTYPE).to(tl.float32)
        first *= tl.load(gain + h, mask=h < HALF, other=0.0).to(tl.float32)[None, :]
        second *= tl.load(gain + HALF + h, mask=h < HALF, other=0.0).to(tl.float32)[None, :]
        first, second = first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)
    c = tl.load(cos + (place * stride_cp)[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + (place * stride_sp)[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    return first * c - second * s, second * c + first * s


@triton.jit
def rope_scatter_kernel(
    q, k, v, cos, sin, positions, query_positions, k_buf, v_buf, out, q_gain, k_gain, q_eps, k_eps,
    query_tokens, tokens,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_cp, stride_sp, stride_pb, stride_pn, stride_qpb, stride_qpn,
    stride_kbb, stride_kbs, stride_kbh, stride_kbd, stride_vbb, stride_vbs, stride_vbh, stride_vbd,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of heads of Q, K or V; grid (tiles of Q, then of K, then of V; B)."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = D // 2
    DTYPE: tl.constexpr = out.dtype.element_ty
    h, r = tl.arange(0, BLOCK_H), tl.arange(0, ROWS)
    query_tiles, key_tiles = tl.cdiv(query_tokens * HQ, ROWS), tl.cdiv(tokens * HKV, ROWS)
    if tile < query_tiles:
        r += tile * ROWS
        token, head = (r // HQ).to(tl.int64), r % HQ
        asked = token < query_tokens
        place = tl.load(query_positions + row * stride_qpb + token * stride_qpn, mask=asked, other=0)
        q_at = q + row * stride_qb + token * stride_qn + head.to(tl.int64) * stride_qh
        first, second = _halves(q_at, asked, HALF, BLOCK_H)
        first, second = _norm_and_rotate(
            first, second, q_gain, q_eps, cos, sin, place, asked, stride_cp, stride_sp, HALF, BLOCK_H, DTYPE
        )
        out_at = out + ((row * query_tokens * HQ + r) * D)[:, None] + h[None, :]
        mask = asked[:, None] & (h < HALF)[None, :]
        tl.store(out_at, first.to(DTYPE), mask=mask)
        tl.store(out_at + HALF, second.to(DTYPE), mask=mask)
    else:
        rest = tile - query_tiles
        r += tl.where(rest < key_tiles, rest, rest - key_tiles) * ROWS
        token, head = (r // HKV).to(tl.int64), r % HKV
        wanted = token < tokens
        slot = tl.load(positions + row * stride_pb + token * stride_pn, mask=wanted, other=0)
        lane, wide_head = h.to(tl.int64)[None, :], head.to(tl.int64)
        mask = wanted[:, None] & (h < HALF)[None, :]
        if rest < key_tiles:
            k_at = k + row * stride_kb + token * stride_kn + wide_head * stride_kh
            first, second = _halves(k_at, wanted, HALF, BLOCK_H)
            first, second = _norm_and_rotate(
                first, second, k_gain, k_eps, cos, sin, slot, wanted, stride_cp, stride_sp, HALF, BLOCK_H, DTYPE
            )
            slot_at = k_buf + row * stride_kbb + (slot * stride_kbs + wide_head * stride_kbh)[:, None]
            tl.store(slot_at + lane * stride_kbd, first.to(DTYPE).to(k_buf.dtype.element_ty), mask=mask)
            tl.store(slot_at + (HALF + lane) * stride_kbd, second.to(DTYPE).to(k_buf.dtype.element_ty), mask=mask)
        else:
            v_at = v + row * stride_vb + token * stride_vn + wide_head * stride_vh
            first, second = _halves(v_at, wanted, HALF, BLOCK_H)
            slot_at = v_buf + row * stride_vbb + (slot * stride_vbs + wide_head * stride_vbh)[:, None]
            tl.store(slot_at + lane * stride_vbd, first.to(DTYPE).to(v_buf.dtype.element_ty), mask=mask)
            tl.store(slot_at + (HALF + lane) * stride_vbd, second.to(DTYPE).to(v_buf.dtype.element_ty), mask=mask)
