"""`cached_attention`: its arguments, and their checks."""

import torch
from torch import Tensor

from dkv.kernels.attention import reference
from dkv.kernels.attention.reference import Rules
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, INTEGERS
from dkv.kernels.common.operation import Operation
from dkv.kernels.common.stored import Stored, buffer_parts, stored
from dkv.kernels.common.workspace import Workspace


def _fake(q, k_buf, v_buf, rules, most_queries, scale, return_lse):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse if return_lse else None


ATTENTION = Operation(reference.cached_attention, _fake)


def cached_attention(
    q: Tensor,
    k_buf: Tensor | Stored,
    v_buf: Tensor | Stored,
    *,
    query_starts: Tensor | None = None,
    most_queries: int | None = None,
    query_lengths: Tensor | None = None,
    query_ends: Tensor | None = None,
    key_ranges: Tensor | None = None,
    key_gaps: Tensor | None = None,
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

    Rows with different numbers of queries may be packed: the queries of all rows stand in one dimension, at places
    that `query_starts` and `query_lengths` name, and are read there.

    Args:
        q: [B, N, Hq, D], or packed [T, Hq, D]; float16, bfloat16, float32 or float64. Hq is a multiple of Hkv, and
            query head h reads key head h // (Hq / Hkv).
        k_buf, v_buf: [B, S, Hkv, D], dtype of q; any strides. Or `Stored` numbers in int8 with their scales
            [B, S, Hkv], as `rope_scatter_` writes them; both alike.
        query_starts: [B] integers, q is packed: the queries of row b are the entries query_starts[b] to
            query_starts[b] + query_lengths[b] - 1. No entry is of two rows. What the result holds at entries of no row
            is not defined.
        most_queries: of packed rows, a number that no length exceeds, which spares work; default T.
        query_lengths: [B] integers, the number of queries of each row. In [B, N, Hq, D] those from this number on
            give 0.
        query_ends: [T] integers, packed rows alone: a query sees only the slots of its row before this one. Attention
            over blocks of b slots that see themselves and those before them has (slot // b + 1) * b, causal attention
            slot + 1. Slots that no query of a tile sees are skipped.
        key_ranges: [B, 2] integers, first visible slot and the one after the last.
        key_gaps: [B, 2] integers, first slot that is hidden from all queries of the row and the one after the last of
            these; equal numbers hide nothing. Hidden slots are skipped, not computed and masked as by `key_mask`.
        key_mask: [B, S] bool, False hides a slot.
        mask: [B, N, S] bool, False hides a slot from a query: the general form, dearer than the others.
        block_ids: integers ([B, N], [B, S]): a key is visible when its block is not later than the
            block of the query. Neither this nor `mask` goes with packed queries.
        scale: factor of the scores; default D ** -0.5.
        return_lse: also return the natural log-sum-exp of the scaled scores.
        workspace: scratch to use again between calls.

    Returns:
        A tensor of the shape and dtype of q, and on request the log-sum-exp, of that shape without D, in float32
        (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or arguments do not go with packed queries.
    """
    packed = query_starts is not None
    *b, n, hq, d = checks.shape("q", q, *[None] * (3 if packed else 4))
    if d == 0:
        raise ValueError(f"q must have a head size of at least 1, got shape {list(q.shape)}")
    k_buf, v_buf = stored(k_buf), stored(v_buf)
    b, s, hkv, _ = checks.shape("k_buf", k_buf, *(b or [None]), None, None, d)
    if hkv == 0 or hq % hkv:
        raise ValueError(f"q has {hq} heads, which is not a multiple of the {hkv} heads of k_buf")
    checks.dtype("q", q, FLOATS)
    parts = {}
    for name, x in (("k_buf", k_buf), ("v_buf", v_buf)):
        parts |= buffer_parts(name, x, b, s, hkv, d, like=q)
    checks.same_dtype(k_buf=k_buf.numbers, v_buf=v_buf.numbers)
    blocks = block_ids or (None, None)
    rules = Rules(query_lengths, key_ranges, key_mask, mask, *blocks, query_starts, key_gaps, query_ends)
    most_queries = _most_queries(rules, n, most_queries)
    known = (
        ("query_lengths", (b,), INTEGERS),
        ("key_ranges", (b, 2), INTEGERS),
        ("key_mask", (b, s), (torch.bool,)),
        ("mask", (b, n, s), (torch.bool,)),
        ("block_ids[0]", (b, n), INTEGERS),
        ("block_ids[1]", (b, s), INTEGERS),
        ("query_starts", (b,), INTEGERS),
        ("key_gaps", (b, 2), INTEGERS),
        ("query_ends", (n,), INTEGERS),
    )
    for (name, shape, dtypes), x in zip(known, rules, strict=True):
        if x is not None:
            checks.shape(name, x, *shape)
            checks.dtype(name, x, dtypes)
    checks.same_device(q=q, **parts, **{name: x for (name, *_), x in zip(known, rules, strict=True)})
    scale = d**-0.5 if scale is None else float(scale)
    out, lse = ATTENTION(q, k_buf, v_buf, rules, most_queries, scale, return_lse, workspace=workspace)
    return (out, lse) if return_lse else out


def _most_queries(rules: Rules, queries: int, given: int | None) -> int:
    """A number that no row's queries exceed, of the N or T `queries`; checks what goes with packed queries."""
    if rules.query_starts is None:
        if given is not None:
            raise ValueError("most_queries is of packed queries: give query_starts too, or leave it out")
        if rules.query_ends is not None:
            raise ValueError("query_ends are of packed queries: give query_starts too, or use mask or block_ids")
        return queries
    if rules.query_lengths is None:
        raise ValueError("query_starts without query_lengths: give the number of queries of each row")
    for name, x in (("mask", rules.mask), ("block_ids", rules.key_blocks)):
        if x is not None:
            raise ValueError(f"{name} does not go with query_starts: give q as [B, N, Hq, D]")
    if given is not None and given < 0:
        raise ValueError(f"most_queries must be at least 0, got {given}")
    return queries if given is None else min(queries, given)
