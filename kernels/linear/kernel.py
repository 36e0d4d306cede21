"""The kernels of products with weights of 8 or 4 bits, and of the sum of their parts.

C is known at compile time: tiles of BLOCK_R rows, BLOCK_N outputs and BLOCK_K inputs, of which there is a multiple if
EVEN; whether weights have 4 bits (FOUR), where the inputs of a tile are those that share a scale; PRECISION and STAGES
of the product.
"""

import triton
import triton.language as tl

from dkv.kernels.common.arguments import Strided


@triton.jit
def _eight(x, weight, scales, r, n, start, stop, C):
    """Scaled sums [R, N] of the rows r and the outputs n, over the inputs from `start` to `stop`."""
    k = start + tl.arange(0, C.BLOCK_K).to(tl.int64)
    x_at = x.ptr + r[:, None] * x.stride[0] + k[None, :] * x.stride[1]  # [R, K]
    weight_at = weight.ptr + n[None, :] * weight.stride[1] + k[:, None] * weight.stride[2]  # [K, N]
    sums = tl.zeros((C.BLOCK_R, C.BLOCK_N), tl.float32)
    for first in tl.range(start, stop, C.BLOCK_K, num_stages=C.STAGES):
        if C.EVEN:
            some, numbers = tl.load(x_at), tl.load(weight_at)
        else:
            left = tl.arange(0, C.BLOCK_K) < stop - first
            some = tl.load(x_at, mask=left[None, :], other=0.0)
            numbers = tl.load(weight_at, mask=left[:, None], other=0)
        # All dtypes hold these whole numbers exactly.
        sums = tl.dot(some, numbers.to(some.dtype), sums, input_precision=C.PRECISION)
        x_at += x.stride[1] * C.BLOCK_K
        weight_at += weight.stride[2] * C.BLOCK_K
    return sums * tl.load(scales.ptr + n * scales.stride[1])[None, :]


@triton.jit
def _four(x, weight, scales, r, n, start, stop, C):
    """The same of packed numbers: byte i of a group has input i, and in its high half that of half a group later."""
    HALF: tl.constexpr = C.BLOCK_K // 2
    h = tl.arange(0, HALF)
    low_at = x.ptr + r[:, None] * x.stride[0] + (start + h).to(tl.int64)[None, :] * x.stride[1]  # [R, K / 2]
    weight_at = weight.ptr + n[None, :] * weight.stride[1] + (start // 2 + h).to(tl.int64)[:, None] * weight.stride[2]
    scales_at = scales.ptr + n * scales.stride[1] + start // C.BLOCK_K * scales.stride[2]
    sums = tl.zeros((C.BLOCK_R, C.BLOCK_N), tl.float32)
    for _ in tl.range(start, stop, C.BLOCK_K, num_stages=C.STAGES):
        # Not among the loads that a compiler sends ahead: it is on its way while those are waited for.
        scale = tl.load(scales_at)
        low, high, pair = tl.load(low_at), tl.load(low_at + x.stride[1] * HALF), tl.load(weight_at)
        of_low, of_high = (pair & 15).to(tl.int8) - 8, (pair >> 4).to(tl.int8) - 8
        of_group = tl.dot(low, of_low.to(low.dtype), input_precision=C.PRECISION)
        of_group = tl.dot(high, of_high.to(low.dtype), of_group, input_precision=C.PRECISION)
        sums += of_group * scale[None, :]
        low_at += x.stride[1] * C.BLOCK_K
        weight_at += weight.stride[2] * HALF
        scales_at += scales.stride[2]
    return sums


@triton.jit
def _tile(x, weight, scales, bias, out, first, last, outputs, start, stop, C):
    """Write the outputs of a tile of rows from `first` on; `last` is the last row that is written."""
    r = first + tl.arange(0, C.BLOCK_R).to(tl.int64)
    n = tl.program_id(1) * C.BLOCK_N + tl.arange(0, C.BLOCK_N).to(tl.int64)
    # What is behind the last row or output is computed like that one and not written: so loads need no masks.
    known_r, known_n = tl.minimum(r, last), tl.minimum(n, outputs - 1)
    if C.FOUR:
        sums = _four(x, weight, scales, known_r, known_n, start, stop, C)
    else:
        sums = _eight(x, weight, scales, known_r, known_n, start, stop, C)
    if bias is not None:
        sums += tl.load(bias.ptr + known_n * bias.stride[0]).to(tl.float32)[None, :]
    inside = (r <= last)[:, None] & (n < outputs)[None, :]
    tl.store(out + r[:, None] * outputs + n[None, :], sums.to(out.dtype.element_ty), mask=inside)


# How many rows there are bounds masks and loops alone: no kernel of its own for a multiple of 16.
@triton.jit(do_not_specialize=["rows"])
def linear_kernel(x, weight, scales, bias, ends, out, rows, outputs, size, of_part, C):
    """x [rows, size] by weight [E, outputs, size] -> out, dense [parts, rows, outputs]: of a part are `of_part` inputs.

    Grid (tiles of rows, or with `ends` experts, tiles of outputs, parts). A program of an expert takes all its rows.
    """
    part = tl.program_id(2)
    start, out = part * of_part, out + part.to(tl.int64) * rows * outputs
    stop = tl.minimum(start + of_part, size)
    if ends is None:
        _tile(x, weight, scales, bias, out, tl.program_id(0) * C.BLOCK_R, rows - 1, outputs, start, stop, C)
    else:
        expert = tl.program_id(0)
        first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        # The ends are not checked on a GPU: whatever they say, nothing outside of x is read or written.
        last = tl.minimum(tl.load(ends + expert), rows) - 1
        own_weight = Strided(weight.ptr + expert.to(tl.int64) * weight.stride[0], weight.stride)
        own_scales = Strided(scales.ptr + expert.to(tl.int64) * scales.stride[0], scales.stride)
        for tile in range(tl.maximum(first, 0), last + 1, C.BLOCK_R):
            _tile(x, own_weight, own_scales, bias, out, tile, last, outputs, start, stop, C)


@triton.jit(do_not_specialize=["total"])
def add_kernel(parts, bias, out, total, outputs, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [total] = the sum of parts, float32 [PARTS, total], in their order, plus bias; grid (tiles,)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    sums = tl.zeros((BLOCK,), tl.float32)
    at = parts + place
    for _ in tl.static_range(PARTS):
        sums += tl.load(at, mask=inside, other=0.0)
        at += total
    if bias is not None:
        sums += tl.load(bias.ptr + place % outputs * bias.stride[0], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)
