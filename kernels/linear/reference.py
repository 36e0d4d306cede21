"""Products with weights of 8 or 4 bits, eager: what is right."""

from collections.abc import Callable

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide
from dkv.kernels.linear.four import unpacked4


def int8_linear(x, weight, scales, bias: Tensor | None, ends: Tensor | None) -> Tensor:
    y = wide(x)

    def product(weight: Tensor, scales: Tensor) -> Tensor:
        return y @ weight.to(y.dtype).T * scales

    return _finished(x, product, weight, scales, bias, ends)


def int4_linear(x, weight, scales, bias: Tensor | None, ends: Tensor | None) -> Tensor:
    y = wide(x)

    def product(weight: Tensor, scales: Tensor) -> Tensor:
        return y @ unpacked4(weight, scales.to(y.dtype)).T

    return _finished(x, product, weight, scales, bias, ends)


def _finished(x: Tensor, product: Callable[[Tensor, Tensor], Tensor], weight, scales, bias, ends) -> Tensor:
    """By one matrix, or for every entry by that of its expert; nothing is read back."""
    if ends is None:
        out = product(weight, scales)
    else:
        expert, out = experts_of(len(x), ends), 0
        for number, one in enumerate(zip(weight, scales, strict=True)):
            out = torch.where((expert == number)[:, None], product(*one), out)
    return (out if bias is None else out + bias).to(x.dtype)


def experts_of(entries: int, ends: Tensor) -> Tensor:
    """The expert of every entry, int64 [T]: how many end before it or with it."""
    return torch.searchsorted(ends, torch.arange(entries, device=ends.device, dtype=ends.dtype), right=True)
