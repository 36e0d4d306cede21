"""The gated activation, eager: what is right."""

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide


def swiglu(gate_up) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    y = wide(gate)
    return (y * torch.sigmoid(y)).to(gate.dtype) * up
