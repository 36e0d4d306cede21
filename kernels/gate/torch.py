"""The gated activation in fast PyTorch."""

import torch.nn.functional as F


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
