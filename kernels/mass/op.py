"""`attention_mass`: its arguments, and their checks."""

import torch
from torch import Tensor

from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, INTEGERS
from dkv.kernels.common.operation import Operation
from dkv.kernels.common.stored import Stored, buffer_parts, stored
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.mass import reference


def _fake(q, k_buf, lse, *_):
    return lse.new_empty(k_buf.shape[:2])


MASS = Operation(reference.attention_mass, _fake, gradient=False)


def attention_mass(
    q: Tensor,
    k_buf: Tensor | Stored,
    lse: Tensor,
    weight: Tensor,
    *,
    query_starts: Tensor,
    query_lengths: Tensor,
    most_queries: int | None = None,
    key_ranges: Tensor | None = None,
    scale: float | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The attention that every slot gets from the packed queries of its row: the mean of the heads, weighted by query.

    For slot s of row b the sum, over the queries n of the row and the query heads h, of
    weight[n] * exp(scale * <q[n, h], k_buf[b, s, h // (Hq / Hkv)]> - lse[n, h]) / Hq.
    With the log-sum-exp that `cached_attention` gave for the same arguments the slots of a row get the sum of its
    weights. A query whose log-sum-exp is -inf, as it saw nothing, gives nothing.

    With weights of 1 it is the column sum of the attention, by which a slot is found to be important (Elastic-Cache,
    arXiv 2510.14973). With the weights that the layer after it got, layer by layer from the last to the first, it is
    the column sum of an attention rollout, the product of all layers' attention (d2Cache, arXiv 2509.23094), without
    one [S, S] matrix.

    Every query is taken to have seen all slots of `key_ranges`. It knows no `query_ends` and no `key_gaps` of
    `cached_attention`: a slot that these hide from a query is counted as if the query saw it, so that the result means
    nothing for block-causal or causal queries.

    Args:
        q: packed [T, Hq, D]; float16, bfloat16, float32 or float64. Hq is a multiple of Hkv.
        k_buf: [B, S, Hkv, D], dtype of q, or `Stored` numbers in int8 with their scales [B, S, Hkv]; any strides.
        lse: [T, Hq] float32 (float64 for float64), natural log-sum-exp of the scaled scores of each query.
        weight: [T], dtype of lse.
        query_starts: [B] integers: the queries of row b are the entries query_starts[b] to
            query_starts[b] + query_lengths[b] - 1. No entry is of two rows; entries of no row are not read.
        query_lengths: [B] integers.
        most_queries: a number that no length exceeds, which spares work; default T.
        key_ranges: [B, 2] integers, first visible slot and the one after the last; a hidden slot gets 0, whatever it
            holds.
        scale: factor of the scores; default D ** -0.5.
        workspace: scratch to use again between calls.

    Returns:
        [B, S], dtype of lse. It has no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    t, hq, d = checks.shape("q", q, None, None, None)
    if d == 0:
        raise ValueError(f"q must have a head size of at least 1, got shape {list(q.shape)}")
    k_buf = stored(k_buf)
    b, _, hkv, _ = checks.shape("k_buf", k_buf, None, None, None, d)
    if hkv == 0 or hq == 0 or hq % hkv:
        raise ValueError(f"q has {hq} heads, which is not a multiple of the {hkv} heads of k_buf, and at least 1")
    checks.dtype("q", q, FLOATS)
    parts = buffer_parts("k_buf", k_buf, *k_buf.shape, like=q)
    summed = (torch.promote_types(q.dtype, torch.float32),)
    checks.fit(
        {
            "q": (q, FLOATS, (t, hq, d)),
            **{name: (x, (x.dtype,), x.shape) for name, x in parts.items()},
            "lse": (lse, summed, (t, hq)),
            "weight": (weight, summed, (t,)),
            "query_starts": (query_starts, INTEGERS, (b,)),
            "query_lengths": (query_lengths, INTEGERS, (b,)),
            "key_ranges": (key_ranges, INTEGERS, (b, 2)),
        }
    )
    if most_queries is not None and most_queries < 0:
        raise ValueError(f"most_queries must be at least 0, got {most_queries}")
    most = t if most_queries is None else min(t, most_queries)
    scale = d**-0.5 if scale is None else float(scale)
    rows = query_starts, query_lengths, key_ranges
    return MASS(q, k_buf, lse, weight, *rows, most, scale, workspace=workspace)
