"""What kernels are given: tensors with their strides, and constants that they are compiled for."""

import functools
from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dkv.kernels.common.launch import INTERPRETED, chip


class Strided(NamedTuple):
    """A tensor as a kernel takes it."""

    ptr: Tensor
    stride: tuple[int, ...]


def strided(x: Tensor | None) -> Strided | None:
    """x with its strides, in numbers."""
    return None if x is None else Strided(x, x.stride())


def strided_alone(x: Tensor) -> Strided:
    """x with its strides, as the only one of a batch. The tensor is the very one: `Ready` looks for it."""
    return Strided(x, x.unsqueeze(0).stride())


def computable(x: Tensor) -> Tensor:
    """x, in float32 if it is bfloat16 in the interpreter, which multiplies the bit patterns of those."""
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 and chip(x.device).arch == "interpreter" else x


def restored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a kernel gave for `computable` tensors, in their own dtype."""
    return x if x.dtype == dtype else x.to(dtype)


def unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not dense: the only layout that the kernels do not read in place."""
    return x if x.stride(-1) == 1 else x.contiguous()


def constants(**values: Any) -> tuple:
    """A named tuple of what a kernel is compiled for.

    In the interpreter an operator must not have one of them at its left and a tensor at its right.
    """
    return _named(tuple(values))(*map(tl.constexpr, values.values()))


@functools.cache
def _named(names: tuple[str, ...]) -> type[tuple]:
    return namedtuple("Constants", names)


def precision(x: Tensor) -> str:
    """How float32 is multiplied: three TF32 products on NVIDIA, which lose next to nothing."""
    return "tf32x3" if x.element_size() == 4 and chip(x.device).arch.startswith("sm_") else "ieee"
