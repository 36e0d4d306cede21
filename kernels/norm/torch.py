"""The norm of hidden states in fast PyTorch."""

import torch

from dkv.kernels.common.dtypes import wide


def rms_norm(x, gain, eps, residual):
    total = x if residual is None else residual + x
    y = wide(total)
    # The length of a row in one pass, where its squares would be written and read again.
    # The length of a row in one pass, where its squares would be written and read again. In place goes what no
    # gradient needs, as new memory costs more than the arithmetic.
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    normed = y * (length * length).div_(y.shape[-1]).add_(eps).rsqrt_()
    return (normed if y is total else normed.to(x.dtype)).mul_(gain), None if residual is None else total
