"""The change of hidden states, and their store, in fast PyTorch."""

import torch

from dkv.kernels.change.reference import EPS
from dkv.kernels.common.dtypes import wide


def row_change(x, delta, kept, positions, rows):
    old = wide(kept[rows, positions])
    new = wide(x if delta is None else x + delta)
    length = torch.linalg.vector_norm(old, dim=-1).div_(x.shape[1] ** 0.5).add_(EPS)
    return (new - old).abs_().mean(-1).div_(length)


def keep_rows_(x, delta, kept, positions, rows, entries):
    if entries is not None:
        x, delta = (y if y is None else y.index_select(0, entries) for y in (x, delta))
    out = x + delta if delta is not None else x if entries is not None else x.clone()
    kept[rows, positions] = out.to(kept.dtype)
    return out
