"""`rope_scatter_`: its arguments, and their checks."""

from torch import Tensor

from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, INTEGERS
from dkv.kernels.common.operation import Operation
from dkv.kernels.common.stored import Stored, buffer_parts, stored
from dkv.kernels.rope_scatter import reference
from dkv.kernels.rope_scatter.reference import Norm

_WRITTEN = [f"{buffer}_{field}" for buffer in ("k_buf", "v_buf") for field in Stored._fields]
ROPE_SCATTER = Operation(reference.rope_scatter_, lambda q, *_: q.new_empty(q.shape), mutates=_WRITTEN)


def rope_scatter_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_buf: Tensor | Stored,
    v_buf: Tensor | Stored,
    *,
    rows: Tensor | None = None,
    query_positions: Tensor | None = None,
    q_norm: tuple[Tensor, float] | None = None,
    k_norm: tuple[Tensor, float] | None = None,
    validate: bool = True,
) -> Tensor:
    """Rotate queries and keys at their positions and write keys and values into their slots.

    The entries of rows of different lengths may be packed: `rows` names the row of each. Then q, k, v, `positions` and
    `query_positions` have one dimension of entries in place of [B, N] and [B, R].

    Args:
        q: [B, R, Hq, D], or packed [R, Hq, D]; R = N unless `query_positions` is given.
        k, v: [B, N, Hkv, D], or packed [N, Hkv, D]; dtype of q.
        cos, sin: [P, W], W from 1 to D / 2: the first 2 * W numbers of a head are rotated, the others are kept. The
            rotation ("rotate half" layout) is computed in the wider of their dtype and that of q, by the kernels in
            float32, and cast back.
        positions: [B, N] or [N], int32 or int64, slots of the buffer and places in the tables. A row must not
            name a slot twice, unless what is written there does not matter.
        k_buf, v_buf: [B, S, Hkv, D], written in place in their own dtype. Or `Stored` numbers in int8 with their scales
            [B, S, Hkv]: what would be written is rounded, slot by slot and head by head (`dkv.kernels.rounded`).
        rows: [N] int32 or int64, the row of the buffer that each of the packed entries is written to.
        query_positions: [B, R] or [R], where the queries stand if not where the keys do.
        q_norm, k_norm: (gain [D], eps) of an RMS norm per head before the rotation.
        validate: check that the positions and rows are in range.

    Returns:
        The rotated queries, of the shape of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: a position or a row is outside the buffer or the tables.
    """
    *b, r, _, d = checks.shape("q", q, *[None] * (4 if rows is None else 3))
    if d % 2:
        raise ValueError(f"q must have an even head size, got {d}")
    *_, n, hkv, _ = checks.shape("k", k, *b, None, None, d)
    checks.shape("v", v, *b, n, hkv, d)
    checks.dtype("q", q, FLOATS)
    checks.same_dtype(q=q, k=k, v=v)
    _, half = checks.shape("cos", cos, None, None)
    if not 1 <= half <= d // 2:
        raise ValueError(f"cos must have shape [any, 1 to {d // 2}], half of a head at most, got {list(cos.shape)}")
    checks.shape("sin", sin, len(cos), half)
    checks.shape("positions", positions, *b, n)
    checks.dtype("positions", positions, INTEGERS)
    k_buf, v_buf = stored(k_buf), stored(v_buf)
    kept = buffer_parts("k_buf", k_buf, *(b or [None]), None, hkv, d) | buffer_parts("v_buf", v_buf, *k_buf.shape)
    if rows is not None:
        checks.shape("rows", rows, n)
        checks.dtype("rows", rows, INTEGERS)
    if query_positions is not None:
        checks.shape("query_positions", query_positions, *b, r)
        checks.dtype("query_positions", query_positions, INTEGERS)
    elif r != n:
        raise ValueError(f"q has {r} entries and k has {n}: give query_positions, the places of the queries")
    norms = {"q_norm": Norm(*(q_norm or ())), "k_norm": Norm(*(k_norm or ()))}
    gains = {f"{name}[0]": norm.gain for name, norm in norms.items()}
    for name, gain in gains.items():
        if gain is not None:
            checks.shape(name, gain, d)
    placed = {"cos": cos, "sin": sin, "positions": positions, **kept}
    checks.same_device(q=q, k=k, v=v, **placed, rows=rows, query_positions=query_positions, **gains)
    if validate:
        checks.index_range("positions", positions, min(k_buf.shape[1], len(cos)))
        if rows is not None:
            checks.index_range("rows", rows, len(k_buf.numbers))
        if query_positions is not None:
            checks.index_range("query_positions", query_positions, len(cos))
    rows, query_positions = (None if x is None else x.long() for x in (rows, query_positions))
    return ROPE_SCATTER(q, k, v, cos, sin, positions.long(), k_buf, v_buf, rows, query_positions, *norms.values())
