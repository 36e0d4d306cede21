"""Dtypes that the operations take, and the one in which they add up."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
BOOLS, LONGS = (torch.bool,), (torch.int64,)


def wide(x: Tensor) -> Tensor:
    """x in the dtype of accumulation: float32 for half precision."""
    return x.float() if x.dtype.itemsize == 2 else x


def of_scales(x: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes that scales of whole numbers may have beside x: float32, and with float64, which is for checking, that."""
    return (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
