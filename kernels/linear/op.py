"""`int8_linear` and `int4_linear`: their arguments, and their checks."""

import torch
from torch import Tensor

from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, of_scales
from dkv.kernels.common.operation import Operation, readable
from dkv.kernels.linear import reference
from dkv.kernels.linear.four import GROUPS


def _fake(x, weight, *_):
    return x.new_empty((*x.shape[:-1], weight.shape[-2]))


INT8_LINEAR = Operation(reference.int8_linear, _fake, gradient=False)
INT4_LINEAR = Operation(reference.int4_linear, _fake, gradient=False)


def int8_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, ends: Tensor | None = None
) -> Tensor:
    """x @ (weight * scales).T + bias, where the weight is whole numbers with a scale for each output.

    Products with the whole numbers are added up in float32 (float64 for float64), then scaled; the bias is added, and
    the result is rounded once. The weight is never held in another dtype.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; with `ends` [T, K], sorted by expert.
        weight: int8 [N, K]; with `ends` [E, N, K].
        scales: float32 [N], or with x also float64; with `ends` [E, N].
        bias: [N], dtype of x, or None; not with `ends`.
        ends: int32 [E], on the device of x, ascending, the last T: the entries before ends[e] and not before
            ends[e - 1] are multiplied with the weight of expert e. They are checked on a CPU, and on a GPU never read.

    Returns:
        [..., N], dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or ends do not fit, or a gradient is asked for: there is none.
    """
    inputs = _fit(x, weight, torch.int8, bias, ends)
    checks.shape("weight", weight, *weight.shape[:-1], inputs)
    _scaled(x, weight, scales, *weight.shape[:-1])
    return INT8_LINEAR(x, weight, scales, bias, ends)


def int4_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, ends: Tensor | None = None
) -> Tensor:
    """`int8_linear` with weights of 4 bits, as `packed4` gives them: a scale for each output and group of inputs.

    Args:
        weight: uint8 [N, K / 2], two numbers to a byte; with `ends` [E, N, K / 2].
        scales: float32 [N, K / G], G of 128, 64 or 32; with `ends` [E, N, K / G].

    The other arguments, the result and the errors are those of `int8_linear`.
    """
    inputs = _fit(x, weight, torch.uint8, bias, ends)
    if inputs != 2 * weight.shape[-1]:
        raise ValueError(
            f"weight holds two numbers to a byte, so for {inputs} inputs of x its last dimension must be "
            f"{inputs / 2:g}, got shape {list(weight.shape)}"
        )
    groups = scales.shape[-1] if scales.dim() else 0
    if not groups or inputs / groups not in GROUPS:
        many = ", ".join(f"{inputs // group} (groups of {group})" for group in GROUPS if inputs % group == 0)
        wanted = many or f"- (no group divides {inputs} inputs: they must be a multiple of {GROUPS[-1]})"
        raise ValueError(f"scales must have a last dimension of {wanted}, got shape {list(scales.shape)}")
    _scaled(x, weight, scales, *weight.shape[:-1], groups)
    return INT4_LINEAR(x, weight, scales, bias, ends)


def _fit(x: Tensor, weight: Tensor, kind: torch.dtype, bias: Tensor | None, ends: Tensor | None) -> int:
    """Check all but the scales and the inputs of the weight; returns the inputs of x."""
    if x.dim() == 0:
        raise ValueError("x must have a last dimension, got a single number")
    checks.dtype("x", x, FLOATS)
    checks.dtype("weight", weight, (kind,))
    if ends is None:
        outputs = checks.shape("weight", weight, None, None)[0]
    else:
        if bias is not None:
            raise ValueError("bias does not go with ends: add it to the result")
        experts = checks.shape("weight with ends", weight, None, None, None)[0]
        if experts == 0:
            raise ValueError("weight with ends must have at least one expert, got none")
        checks.shape("x with ends", x, None, None)
        checks.shape("ends", ends, experts)
        checks.dtype("ends", ends, (torch.int32,))
    if bias is not None:
        checks.shape("bias", bias, outputs)
        checks.same_dtype(x=x, bias=bias)
    checks.same_device(x=x, weight=weight, bias=bias, ends=ends)
    if ends is not None and readable(ends):
        _check_ends(ends, len(x))
    return x.shape[-1]


def _scaled(x: Tensor, weight: Tensor, scales: Tensor, *sizes: int) -> None:
    checks.shape("scales", scales, *sizes)
    checks.dtype("scales", scales, of_scales(x))
    checks.same_device(x=x, scales=scales)


def _check_ends(ends: Tensor, entries: int) -> None:
    found = ends.tolist()
    if found[-1] != entries:
        raise ValueError(f"the last of ends must be the number of entries of x, {entries}, got {found[-1]}")
    if found != sorted(found) or found[0] < 0:
        raise ValueError(f"ends must be ascending and at least 0, got {found}")
