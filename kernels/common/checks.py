"""Argument checks: every mistake is named, with what was found and what is needed."""

import torch
from torch import Tensor


def shape(name: str, x: Tensor, *expected: int | None) -> tuple[int, ...]:
    """x has `expected` sizes, which are returned; None stands for any size."""
    sizes = x.shape
    if sizes == expected:  # at once, as this runs several times in every layer of every step
        return sizes
    fits = len(sizes) == len(expected)
    for size, want in zip(sizes, expected, strict=False):
        if want is not None and size != want:
            fits = False
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(sizes)}")
    return sizes


def dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name} must be {names}, got {str(x.dtype).removeprefix('torch.')}")


def same_dtype(**tensors: Tensor) -> None:
    first = next(iter(tensors))
    dtype = tensors[first].dtype
    for name, x in tensors.items():
        if x.dtype != dtype:
            raise ValueError(f"{name} is {x.dtype} but {first} is {dtype}: convert one of them")


def same_device(**tensors: Tensor | None) -> None:
    """All tensors that are not None live on one device."""
    first = device = None
    for name, x in tensors.items():
        if x is None:
            continue
        if first is None:
            first, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{name} is on {x.device} but {first} is on {device}: move one of them")


def index_range(name: str, index: Tensor, size: int) -> None:
    """Every index is in [0, size). Reads two numbers back."""
    if index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"{name} must be in 0..{size - 1}, got {low if low < 0 else high}")


def fit(tensors: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...], tuple[int | None, ...]]]) -> None:
    """Each tensor that is given has one of its dtypes and its shape, and all live on the device of the first."""
    for name, (x, allowed, sizes) in tensors.items():
        if x is not None:
            shape(name, x, *sizes)
            dtype(name, x, allowed)
    same_device(**{name: x for name, (x, _, _) in tensors.items()})
