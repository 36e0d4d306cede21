"""Bias, head norms, rotation and the write into the buffer, in Triton: one launch.

A row of a tile is one head of one token: row r is token r // H, head r % H. The programs take the
rows of Q, then those of K, then those of V.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from dkv.kernels.triton_backend.cases import Case
from dkv.kernels.triton_backend.launch import Launch, LaunchTable, computable, power_of_two, strides, unit_stride


@triton.jit
def _halves(x_at, bias, head, inside, HALF: tl.constexpr, BLOCK_H: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of the heads at `x_at` [R], with the bias added: float32 [R, H] each."""
    h = tl.arange(0, BLOCK_H)
    mask = inside[:, None] & (h < HALF)[None, :]
    first = tl.load(x_at[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_at[:, None] + (HALF + h)[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        bias_at = bias + (head * (2 * HALF))[:, None] + h[None, :]
        first += tl.load(bias_at, mask=mask, other=0.0).to(tl.float32)
        second += tl.load(bias_at + HALF, mask=mask, other=0.0).to(tl.float32)
        first, second = first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)
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
def _rope_scatter_kernel(
    q, k, v, cos, sin, positions, query_positions, lengths, query_lengths, k_buf, v_buf, out,
    q_bias, k_bias, v_bias, q_gain, k_gain, q_eps, k_eps, query_tokens, tokens,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_cp, stride_sp, stride_pb, stride_pn, stride_qpb, stride_qpn, stride_lb,
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
        placed = asked
        if query_lengths is not None:
            # What is not used may hold any position: it is rotated as at position 0.
            placed = asked & (token < tl.load(query_lengths + row * stride_lb))
        place = tl.load(query_positions + row * stride_qpb + token * stride_qpn, mask=placed, other=0)
        q_at = q + row * stride_qb + token * stride_qn + head.to(tl.int64) * stride_qh
        first, second = _halves(q_at, q_bias, head, asked, HALF, BLOCK_H, DTYPE)
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
        if lengths is not None:
            wanted = wanted & (token < tl.load(lengths + row * stride_lb))
        slot = tl.load(positions + row * stride_pb + token * stride_pn, mask=wanted, other=0)
        lane, wide_head = h.to(tl.int64)[None, :], head.to(tl.int64)
        mask = wanted[:, None] & (h < HALF)[None, :]
        if rest < key_tiles:
            k_at = k + row * stride_kb + token * stride_kn + wide_head * stride_kh
            first, second = _halves(k_at, k_bias, head, wanted, HALF, BLOCK_H, DTYPE)
            first, second = _norm_and_rotate(
                first, second, k_gain, k_eps, cos, sin, slot, wanted, stride_cp, stride_sp, HALF, BLOCK_H, DTYPE
            )
            slot_at = k_buf + row * stride_kbb + (slot * stride_kbs + wide_head * stride_kbh)[:, None]
            tl.store(slot_at + lane * stride_kbd, first.to(DTYPE).to(k_buf.dtype.element_ty), mask=mask)
            tl.store(slot_at + (HALF + lane) * stride_kbd, second.to(DTYPE).to(k_buf.dtype.element_ty), mask=mask)
        else:
            v_at = v + row * stride_vb + token * stride_vn + wide_head * stride_vh
            first, second = _halves(v_at, v_bias, head, wanted, HALF, BLOCK_H, DTYPE)
            slot_at = v_buf + row * stride_vbb + (slot * stride_vbs + wide_head * stride_vbh)[:, None]
            tl.store(slot_at + lane * stride_vbd, first.to(DTYPE).to(v_buf.dtype.element_ty), mask=mask)
            tl.store(slot_at + (HALF + lane) * stride_vbd, second.to(DTYPE).to(v_buf.dtype.element_ty), mask=mask)


# Tile: (heads of tokens,). Regime: head size up to. 1024 numbers to a program keep the accesses of 2-byte numbers
# 128 bits wide, and leave enough programs to fill a GPU when few tokens are active.
SIZES = (32, 64, 128, 256)
TABLE = LaunchTable(
    "rope_scatter_",
    {
        "default": {size: Launch((1024 // size,), 2) for size in SIZES},
        "interpreter": {size: Launch((256,), 2) for size in SIZES},
    },
    candidates=tuple(Launch((rows,), warps) for rows in (4, 8, 16, 32) for warps in (1, 2, 4)),
)


def rope_scatter_(
    q, k, v, cos, sin, positions, k_buf, v_buf, *, query_positions=None, lengths=None, q_bias=None, k_bias=None,
    v_bias=None, q_norm=None, k_norm=None, row=None,
):  # fmt: skip
    """`dkv.kernels.rope_scatter_`; `row` fixes the launch."""
    (batch, query_tokens, heads, size), (tokens, kv_heads) = q.shape, k.shape[1:3]
    (q_gain, q_eps), (k_gain, k_eps) = q_norm or (None, 0.0), k_norm or (None, 0.0)
    # Only numbers that are stored need care in the interpreter: a load is made float32 at once.
    keys, values, out = computable(k_buf), computable(v_buf), computable(q.new_empty(q.shape))
    query_lengths = lengths if query_positions is None else None
    query_positions = positions if query_positions is None else query_positions
    inputs = [unit_stride(x) for x in (q, k, v, cos, sin)]
    small = [x if x is None else x.contiguous() for x in (q_bias, k_bias, v_bias, q_gain, k_gain)]

    def run(row: Launch) -> None:
        (rows,) = row.tile
        tiles = triton.cdiv(query_tokens * heads, rows) + 2 * triton.cdiv(tokens * kv_heads, rows)
        _rope_scatter_kernel[(tiles, batch)](
            *inputs, positions, query_positions, lengths, query_lengths, keys, values, out,
            *small, float(q_eps), float(k_eps), query_tokens, tokens,
            *(s for x in inputs for s in x.stride()[:-1]), *positions.stride(), *query_positions.stride(),
            *strides(lengths, 1), *keys.stride(), *values.stride(),
            HQ=heads, HKV=kv_heads, D=size, BLOCK_H=power_of_two(size // 2), ROWS=rows, num_warps=row.warps,
        )  # fmt: skip

    if q.numel() or k.numel():
        TABLE.start(q.device, min(max(SIZES[0], power_of_two(size)), SIZES[-1]), run, row)
    for buffer, written in ((k_buf, keys), (v_buf, values)):
        if written is not buffer:
            buffer.copy_(written)
    return out.to(q.dtype)


def audit_cases(arch: str) -> Iterator[Case]:
    """Every row with nothing optional and with everything, and a head size that is no power of two."""
    for size, row in TABLE.on(arch):
        for dtype, full, head_size in (("bf16", False, size), ("bf16", True, size), ("fp32", True, size - 16)):
            yield _case(row, dtype, full, head_size)


def _case(row: Launch, dtype: str, full: bool, size: int) -> Case:
    constants = {
        "HQ": 28, "HKV": 4, "D": size, "BLOCK_H": power_of_two(size // 2), "ROWS": row.tile[0],
        "stride_kbd": 1, "stride_vbd": 1, "stride_pn": 1, "stride_qpn": 1, "stride_lb": 1,
    }  # fmt: skip
    arguments = dict.fromkeys(("q", "k", "v", "k_buf", "v_buf", "out"), f"*{dtype}")
    arguments |= {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "query_positions": "*i64"}
    optional = dict.fromkeys(("q_bias", "k_bias", "v_bias", "q_gain", "k_gain"), f"*{dtype}")
    optional |= {"lengths": "*i64", "query_lengths": "*i64"}
    if full:
        arguments |= optional
    else:
        constants |= dict.fromkeys(optional)
    pointers = tuple(arguments)
    arguments |= {"q_eps": "fp32", "k_eps": "fp32", "query_tokens": "i32", "tokens": "i32"}
    of_heads = [name for name in _rope_scatter_kernel.arg_names if name.startswith("stride_") and name not in constants]
    arguments |= dict.fromkeys(of_heads, "i32")
    loose = () if size % 32 == 0 else ("stride_cp", "stride_sp")
    aligned = (*pointers, *(name for name in of_heads if name not in ("stride_pb", "stride_qpb", *loose)))
    name = f"rope_scatter_ {dtype} D{size} {'full' if full else 'plain'} {row.tile[0]} rows"
    return Case(name, _rope_scatter_kernel, row, arguments, constants, aligned)
