"""The kernel of the norm: a program takes whole rows."""

import triton
import triton.language as tl


# How many rows there are bounds masks alone: no kernel of its own for a multiple of 16.
@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(x, residual, gain, out, total, rows, eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """x and residual [rows, D], dense; out and total alike; grid (tiles of rows,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        # The norm is of the sum as it is kept.
        value = value.to(total.dtype.element_ty)
        tl.store(total + place, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    normed = (value * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
    weight = tl.load(gain + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + place, (normed * weight[None, :]).to(out.dtype.element_ty), mask=inside)
