"""Rows between canvas order and active order."""

from torch import Tensor

from dkv.kernels import checks, ops


def gather_rows(x: Tensor, index: Tensor, *, validate: bool = True) -> Tensor:
    """Rows of a canvas in active order: out[b, n] = x[b, index[b, n]].

    Args:
        x: [B, S, ...], any dtype.
        index: [B, N] int32 or int64.
        validate: check that the index is in range.

    Returns:
        [B, N, ...].

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: an index is outside 0..S-1.
    """
    _check_rows(x, index, validate)
    return ops.run("gather_rows", x, index.long())


def scatter_rows_(x: Tensor, index: Tensor, source: Tensor, *, validate: bool = True) -> Tensor:
    """Rows in active order into a canvas, in place: x[b, index[b, n]] = source[b, n].

    Args:
        x: [B, S, ...], any dtype; returned.
        index: [B, N] int32 or int64, without repetitions in a row (else any of the writes may stay).
        source: [B, N, ...], converted to the dtype of x.
        validate: check that the index is in range.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: an index is outside 0..S-1.
    """
    _check_rows(x, index, validate)
    checks.shape("source", source, *index.shape, *x.shape[2:])
    checks.same_device(x=x, source=source)
    return ops.run("scatter_rows_", x, index.long(), source)


def _check_rows(x: Tensor, index: Tensor, validate: bool) -> None:
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, S, ...], got {list(x.shape)}")
    checks.shape("index", index, x.shape[0], None)
    checks.dtype("index", index, checks.INTEGERS)
    checks.same_device(x=x, index=index)
    if validate:
        checks.index_range("index", index, x.shape[1])
