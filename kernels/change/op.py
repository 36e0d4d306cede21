"""`row_change` and `keep_rows_`: their arguments, and their checks."""

from torch import Tensor

from dkv.kernels.change import reference
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, LONGS, wide
from dkv.kernels.common.operation import Operation

ROW_CHANGE = Operation(reference.row_change, lambda x, *_: wide(x).new_empty(len(x)), gradient=False)
KEEP_ROWS = Operation(
    reference.keep_rows_,
    lambda x, delta, kept, positions, *_: x.new_empty(len(positions), x.shape[1]),
    mutates=("kept",),
    gradient=False,
)


def row_change(
    x: Tensor, kept: Tensor, positions: Tensor, rows: Tensor, *, delta: Tensor | None = None, validate: bool = True
) -> Tensor:
    """How far hidden states h are from those that were kept of the same slots: mean |h - k| / (rms(k) + 1e-6).

    It is the measure by which early skipping (ES-dLLM, published code) ranks slots. The mean and the root mean square
    are over the d numbers of a slot.

    Args:
        x: [T, d], float16, bfloat16 (both computed in float32), float32 or float64.
        kept: [B, S, d], dtype of x, the states k of all slots.
        positions, rows: int64 [T], the slot and the row of each of the T.
        delta: [T, d], dtype of x: h is x + delta, rounded to the dtype of x; None: h is x.
        validate: check that positions and rows are in range.

    Returns:
        [T], float32, or float64 of float64.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: a position or a row is out of range.
    """
    _check(x, kept, positions, rows, delta, None, validate)
    return ROW_CHANGE(x, delta, kept, positions, rows)


def keep_rows_(
    x: Tensor,
    kept: Tensor,
    positions: Tensor,
    rows: Tensor,
    *,
    entries: Tensor | None = None,
    delta: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """Keep the hidden states of the entries that go on, in place, and return them.

    Args:
        x: [N, d], float.
        kept: [B, S, d], dtype of x, the states of all slots.
        positions, rows: int64 [T], slot and row of the entries that go on, no slot twice but one that is spare.
        entries: int64 [T], which of the N they are; None: all, in order.
        delta: [N, d], dtype of x, which is added to x.
        validate: check that entries, positions and rows are in range.

    Returns:
        [T, d], what was kept.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: an entry, a position or a row is out of range.
    """
    _check(x, kept, positions, rows, delta, entries, validate)
    return KEEP_ROWS(x, delta, kept, positions, rows, entries)


def _check(x, kept, positions, rows, delta, entries, validate: bool) -> None:
    count, width = checks.shape("x", x, None, None)
    b, s, _ = checks.shape("kept", kept, None, None, width)
    (t,) = checks.shape("positions", positions, None)
    if entries is None and t != count:
        raise ValueError(f"positions must have shape [{count}], got {[t]}; or say with entries which of x they are of")
    alike = (x.dtype,)
    checks.fit(
        {
            "x": (x, FLOATS, (count, width)),
            "kept": (kept, alike, (b, s, width)),
            "delta": (delta, alike, (count, width)),
            "positions": (positions, LONGS, (t,)),
            "rows": (rows, LONGS, (t,)),
            "entries": (entries, LONGS, (t,)),
        }
    )
    if width == 0:
        raise ValueError("x must have a last dimension of at least 1")
    if validate:
        for name, index, size in (("positions", positions, s), ("rows", rows, b), ("entries", entries, count)):
            if index is not None:
                checks.index_range(name, index, size)
