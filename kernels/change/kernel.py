"""The kernels of hidden states that are compared and kept: a program takes whole rows of states, one or few entries."""

import triton
import triton.language as tl


@triton.jit
def _states(x, delta, entry, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """x + delta of entries [R], rounded to their dtype: [R, BLOCK], 0 where there is nothing."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < D)[None, :]
    place = entry.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(x + place, mask=mask, other=0.0)
    if delta is not None:
        value = value.to(tl.float32) + tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty)
    return value


@triton.jit
def _kept_at(kept, positions, rows, entry, inside, BLOCK: tl.constexpr):
    """Pointers [R, BLOCK] to what is kept of the slots of entries [R]."""
    slot, row = tl.load(positions + entry, mask=inside, other=0), tl.load(rows + entry, mask=inside, other=0)
    at = row * kept.stride[0] + slot * kept.stride[1]
    return kept.ptr + at[:, None] + tl.arange(0, BLOCK).to(tl.int64)[None, :] * kept.stride[2]


# Counts bound masks alone, and indices are read one by one: no kernel of its own for a multiple of 16.
@triton.jit(do_not_specialize=["positions", "rows", "count"])
def row_change_kernel(
    x,
    delta,
    kept,
    positions,
    rows,
    out,
    count,
    EPS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x and delta [count, D], dense; kept [B, S, D]; out [count] float32; grid (tiles of entries,)."""
    entry, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = entry < count
    mask = inside[:, None] & (column < D)[None, :]
    new = _states(x, delta, entry, inside, D, BLOCK).to(tl.float32)
    old = tl.load(_kept_at(kept, positions, rows, entry, inside, BLOCK), mask=mask, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(old * old, 1) / D) + EPS
    tl.store(out + entry, tl.sum(tl.abs(new - old), 1) / D / length, mask=inside)


@triton.jit(do_not_specialize=["positions", "rows", "entries", "count"])
def keep_rows_kernel(
    x,
    delta,
    kept,
    positions,
    rows,
    entries,
    out,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The states of the `entries` of x and delta, into kept [B, S, D] and out [count, D]; grid (tiles of these,).

    All but `kept` are dense. What fills up may write a spare slot several times.
    """
    place, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = place < count
    mask = inside[:, None] & (column < D)[None, :]
    entry = place
    if entries is not None:
        entry = tl.load(entries + place, mask=inside, other=0)
    value = _states(x, delta, entry, inside, D, BLOCK)
    tl.store(out + place.to(tl.int64)[:, None] * D + column[None, :], value, mask=mask)
    tl.store(_kept_at(kept, positions, rows, place, inside, BLOCK), value, mask=mask)
