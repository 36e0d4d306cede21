"""`cached_attention`: its arguments, and their checks."""

import torch
from torch import Tensor

from dkv.kernels.attention import reference
from dkv.kernels.attention.reference import Rules
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, INTEGERS
from dkv.kernels.common.operation import Operation
from dkv.kernels.common.workspace import Workspace


def _fake(q, k_buf, v_buf, rules, scale, return_lse):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse if return_lse else None


ATTENTION = Operation(reference.cached_attention, _fake)


def cached_attention(
    q: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    *,
    query_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    block_ids: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    workspace: Workspace | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bidirectional attention of the active queries over the whole buffer.

    A key is visible to a query when every rule that is given allows it. A query without a visible
    key gives 0, and -inf as its log-sum-exp. What is hidden, queries beyond `query_lengths` included, may hold
    anything, NaN too; NaN or infinity that a query sees makes its result NaN or infinite. A score of -inf is as good
    as hidden.

    Args:
        q: [B, N, Hq, D], float16, bfloat16, float32 or float64; Hq is a multiple of Hkv, and query
            head h reads key head h // (Hq / Hkv).
        k_buf, v_buf: [B, S, Hkv, D], dtype of q; any strides.
        query_lengths: [B] integers; queries from this number on give 0.
        key_ranges: [B, 2] integers, first visible slot and the one after the last.
        key_mask: [B, S] bool, False hides a slot.
        mask: [B, N, S] bool, False hides a slot from a query: the general form, dearer than the others.
        block_ids: integers ([B, N], [B, S]): a key is visible when its block is not later than the
            block of the query.
        scale: factor of the scores; default D ** -0.5.
        return_lse: also return the natural log-sum-exp of the scaled scores.
        workspace: scratch to use again between calls.

    Returns:
        [B, N, Hq, D] in the dtype of q, and on request the log-sum-exp [B, N, Hq], float32
        (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    b, n, hq, d = checks.shape("q", q, None, None, None, None)
    if d == 0:
        raise ValueError(f"q must have a head size of at least 1, got shape {list(q.shape)}")
    checks.shape("k_buf", k_buf, b, None, None, d)
    s, hkv = k_buf.shape[1:3]
    checks.shape("v_buf", v_buf, b, s, hkv, d)
    if hkv == 0 or hq % hkv:
        raise ValueError(f"q has {hq} heads, which is not a multiple of the {hkv} heads of k_buf")
    checks.dtype("q", q, FLOATS)
    checks.same_dtype(q=q, k_buf=k_buf, v_buf=v_buf)
    rules = Rules(query_lengths, key_ranges, key_mask, mask, *(block_ids or (None, None)))
    known = (
        ("query_lengths", (b,), INTEGERS),
        ("key_ranges", (b, 2), INTEGERS),
        ("key_mask", (b, s), (torch.bool,)),
        ("mask", (b, n, s), (torch.bool,)),
        ("block_ids[0]", (b, n), INTEGERS),
        ("block_ids[1]", (b, s), INTEGERS),
    )
    for (name, shape, dtypes), x in zip(known, rules, strict=True):
        if x is not None:
            checks.shape(name, x, *shape)
            checks.dtype(name, x, dtypes)
            checks.same_device(q=q, **{name: x})
    checks.same_device(q=q, k_buf=k_buf, v_buf=v_buf)
    scale = d**-0.5 if scale is None else float(scale)
    out, lse = ATTENTION(q, k_buf, v_buf, rules, scale, return_lse, workspace=workspace)
    return (out, lse) if return_lse else out
