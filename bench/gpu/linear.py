"""Products with weights of 8 and 4 bits: their inputs and ways."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv import kernels
from dkv.bench.gpu.cases import Case, Inputs, Sizes, nbytes, randn, tolerance
from dkv.models.int8 import quantised


def linear8(z: Sizes, device: torch.device, **how: Any) -> Case:
    """A product with weights of 8 bits; arguments as those of `_linear`."""
    return _linear(z, device, 8, **how)


def linear4(z: Sizes, device: torch.device, **how: Any) -> Case:
    """`linear8` with weights of 4 bits."""
    return _linear(z, device, 4, **how)


def _linear(
    z: Sizes, device: torch.device, bits: int, down: bool = False, bias: bool = False, experts: int = 0
) -> Case:
    """Gate and up of the active slots.

    Args:
        down: the product that comes after, of fewer outputs from more inputs.
        experts: the slots are spread over so many, of which the first has none.
    """
    hidden, width = z.spec.hidden_size, z.spec.intermediate_size
    size = (hidden, width) if down else (2 * width, hidden)
    if experts:
        size = (experts, *size)
    weight, scales = (quantised if bits == 8 else kernels.packed4)(randn(device, *size) * size[-1] ** -0.5)
    inputs: Inputs = {"x": randn(device, z.batch * z.active, size[-1], dtype=z.dtype)}
    inputs |= {"weight": weight, "scales": scales}
    if bias:
        inputs["bias"] = randn(device, size[-2], dtype=z.dtype)
    if experts:
        inputs["ends"] = torch.arange(experts, dtype=torch.int32, device=device) * len(inputs["x"]) // (experts - 1)
    operation = kernels.int8_linear if bits == 8 else kernels.int4_linear
    rows, outputs = len(inputs["x"]), size[-2]
    return Case(
        f"int{bits}_linear",
        {"R": rows, "N": outputs, "K": size[-1]} | ({"E": experts} if experts else {}),
        inputs,
        lambda x: operation(**x),
        # Rounded once; PyTorch's own product rounds the scales, too.
        tolerance(z.dtype, 2, sums=64),
        nbytes(*inputs.values()) + rows * outputs * z.dtype.itemsize,
        2 * rows * outputs * size[-1],
        {} if experts else _others(z.dtype, bits, inputs),
        # Its weights are rounded to the dtype.
        eager_tolerance=tolerance(z.dtype, 4, sums=64),
    )


def _others(dtype: torch.dtype, bits: int, inputs: Inputs) -> dict[str, Callable[[Inputs], Tensor]]:
    """A library's product with the same weights in the dtype of x, and where PyTorch has it that of 8 bits."""
    weight, scales, bias = inputs["weight"], inputs["scales"], inputs.get("bias")
    plain = (weight * scales[:, None] if bits == 8 else kernels.unpacked4(weight, scales)).to(dtype)
    ways = {"eager": lambda x: F.linear(x["x"], plain, bias)}
    if bits == 8 and bias is None and hasattr(torch, "_weight_int8pack_mm"):
        rounded = scales.to(dtype)
        ways["int8pack"] = lambda x: torch._weight_int8pack_mm(x["x"], weight, rounded)
    return ways
