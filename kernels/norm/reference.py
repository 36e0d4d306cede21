"""The norm of hidden states, eager: what is right."""

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide


def rms_norm(x, gain, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The norm, and the sum of which it is where a residual is given."""
    total = x if residual is None else residual + x
    y = wide(total)
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * scale).to(x.dtype) * gain, None if residual is None else total
