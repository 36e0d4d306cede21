"""The kernel of the gated activation."""

import triton
import triton.language as tl


# How many rows there are bounds masks alone: no kernel of its own for a multiple of 16.
@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(gate_up, out, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [rows, 2 D] and out [rows, D], dense; grid (tiles of rows, tiles of columns)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    first = row.to(tl.int64)[:, None] * D
    gate = tl.load(gate_up + 2 * first + column[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * first + D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + first + column[None, :], (gate * up).to(out.dtype.element_ty), mask=inside)
