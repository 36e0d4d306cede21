"""The attention that slots get, eager: what is right."""

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.stored import Stored


def attention_mass(
    q,
    k_buf: Stored,
    lse,
    weight,
    query_starts,
    query_lengths,
    key_ranges: Tensor | None,
    most_queries: int,
    scale: float,
    **_,
) -> Tensor:
    """`dkv.kernels.attention_mass`: every row by itself. `most_queries` spares work, and changes no result."""
    mass, group = wide(q).new_zeros(k_buf.shape[:2]), q.shape[1] // k_buf.shape[2]
    for row, (start, length) in enumerate(zip(query_starts.tolist(), query_lengths.tolist(), strict=True)):
        own, visible = slice(start, start + max(length, 0)), slice(None)
        if key_ranges is not None:
            visible = slice(*key_ranges[row].clamp(min=0).tolist())
        key = k_buf.at((row, visible)).wide(q).repeat_interleave(group, 1)
        scores = torch.einsum("nhd,shd->nhs", wide(q[own]), key) * scale
        share = torch.exp(scores - finite_or_no_share(lse[own]).unsqueeze(-1)).mean(1)
        mass[row, visible] = weight[own] @ share
    return mass


def finite_or_no_share(lse: Tensor) -> Tensor:
    """lse, infinite where it is -infinite: a query that saw nothing then has a share of 0 for every slot."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
