"""The norm of hidden states in fast PyTorch."""

import torch

from dkv.kernels.common.dtypes import wide


def rms_norm(x, gain, eps, residual):
    total = x if residual is None else residual + x
    y = wide(total)
    # The length of a row in one pass, where its squares would be written and read again.
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    scale = torch.rsqrt(length.square() / y.shape[-1] + eps)
    return (y * scale).to(x.dtype) * gain, None if residual is None else total
