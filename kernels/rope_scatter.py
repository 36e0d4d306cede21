"""Bias, head norms, rotation and the write into the buffer, as one operation."""

from torch import Tensor

from dkv.kernels import checks, ops


def rope_scatter_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    *,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    q_norm: tuple[Tensor, float] | None = None,
    k_norm: tuple[Tensor, float] | None = None,
    validate: bool = True,
) -> Tensor:
    """Rotate queries and keys at their positions and write keys and values into their slots.

    Args:
        q: [B, R, Hq, D]; R = N unless `query_positions` is given.
        k, v: [B, N, Hkv, D], dtype of q.
        cos, sin: [P, D / 2]. The rotation ("rotate half" layout) is computed in the wider of their
            dtype and that of q, by the kernels in float32, and cast back.
        positions: [B, N] int32 or int64, slots of the buffer and rows of the tables. A row must not
            name a slot twice, unless what is written there does not matter.
        k_buf, v_buf: [B, S, Hkv, D], written in place in their own dtype.
        query_positions: [B, R], where the queries stand if not where the keys do.
        lengths: [B], how many of the N entries of a row are written; the rest is ignored.
        q_bias: [Hq, D], dtype of q; added before the norm.
        k_bias, v_bias: [Hkv, D], dtype of q.
        q_norm, k_norm: (gain [D], eps) of an RMS norm per head before the rotation.
        validate: check that the positions are in range.

    Returns:
        The rotated queries [B, R, Hq, D].

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: a position is outside the buffer or the tables.
    """
    b, r, hq, d = checks.shape("q", q, None, None, None, None)
    if d % 2:
        raise ValueError(f"q must have an even head size, got {d}")
    checks.shape("k", k, b, None, None, d)
    n, hkv = k.shape[1:3]
    checks.shape("v", v, b, n, hkv, d)
    checks.dtype("q", q, checks.FLOATS)
    checks.same_dtype(q=q, k=k, v=v)
    biases = {"q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias}
    for name, bias in biases.items():
        if bias is not None:
            checks.shape(name, bias, hq if name == "q_bias" else hkv, d)
            checks.same_dtype(q=q, **{name: bias})
    checks.shape("cos", cos, None, d // 2)
    checks.shape("sin", sin, len(cos), d // 2)
    checks.shape("positions", positions, b, n)
    checks.dtype("positions", positions, checks.INTEGERS)
    checks.shape("k_buf", k_buf, b, None, hkv, d)
    checks.shape("v_buf", v_buf, *k_buf.shape)
    if query_positions is not None:
        checks.shape("query_positions", query_positions, b, r)
        checks.dtype("query_positions", query_positions, checks.INTEGERS)
    elif r != n:
        raise ValueError(f"q has {r} entries and k has {n}: give query_positions, the places of the queries")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            checks.shape(f"{name}[0]", norm[0], d)
    if lengths is not None:
        checks.shape("lengths", lengths, b)
        checks.dtype("lengths", lengths, checks.INTEGERS)
    checks.same_device(
        q=q, k=k, v=v, cos=cos, sin=sin, positions=positions, k_buf=k_buf, v_buf=v_buf,
        query_positions=query_positions, lengths=lengths, **biases,
        **{"q_norm[0]": q_norm and q_norm[0], "k_norm[0]": k_norm and k_norm[0]},
    )  # fmt: skip
    if validate:
        checks.index_range("positions", positions, min(k_buf.shape[1], len(cos)), lengths)
        if query_positions is not None:
            checks.index_range("query_positions", query_positions, len(cos))
    return ops.run(
        "rope_scatter_", q, k, v, cos, sin, positions.long(), k_buf, v_buf,
        query_positions=None if query_positions is None else query_positions.long(), lengths=lengths, **biases,
        q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip
