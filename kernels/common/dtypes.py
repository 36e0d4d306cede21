"""Dtypes that the operations take, and the one in which they add up."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
BOOLS, LONGS = (torch.bool,), (torch.int64,)


def wide(x: Tensor) -> Tensor:
    """x in the dtype of accumulation: float32 for half precision."""
    return x.float() if x.dtype.itemsize == 2 else x
