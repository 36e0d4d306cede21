"""Weights of 4 bits: how they are rounded, and how two of them stand in a byte."""

import torch
from torch import Tensor

# Inputs that share a scale: the first of these numbers that divides the inputs.
GROUPS = (128, 64, 32)
# The largest whole number; in a half of a byte it stands 8 higher. And a scale that is smaller than any of use.
MOST, ZERO, LEAST = 7, 8, 1e-30


def group_of(inputs: int) -> int:
    """How many inputs share a scale.

    Raises:
        ValueError: `inputs` is not a multiple of 32.
    """
    for group in GROUPS:
        if inputs and inputs % group == 0:
            return group
    raise ValueError(f"weights of 4 bits need a number of inputs that is a multiple of {GROUPS[-1]}, got {inputs}")


def packed4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in 4 bits: the nearest of the numbers -7..7 times a scale, by output and group of inputs.

    Of a group of G inputs, byte i holds input i in its low half and input i + G/2 in its high half: a kernel multiplies
    each half of the bytes with numbers that stand side by side.

    Args:
        weight: [..., N, K], any float dtype.

    Returns:
        uint8 [..., N, K / 2], and scales, float32 [..., N, K / G] with G of 128, 64 or 32, the largest that divides K.

    Raises:
        ValueError: K is not a multiple of 32.
    """
    grouped = weight.float().unflatten(-1, (-1, group_of(weight.shape[-1])))
    scales = grouped.abs().amax(-1).clamp_min_(LEAST).div_(MOST)
    numbers = (grouped / scales.unsqueeze(-1)).round_().add_(ZERO).to(torch.uint8)
    low, high = numbers.chunk(2, -1)
    return (low | high << 4).flatten(-2), scales


def numbers4(weight: Tensor, groups: int) -> Tensor:
    """The whole numbers int8 [..., N, K] of packed weights [..., N, K / 2] with so many groups in a row."""
    halves = weight.unflatten(-1, (groups, -1))
    return torch.cat((halves & 15, halves >> 4), -1).to(torch.int8).sub_(ZERO).flatten(-2)


def unpacked4(weight: Tensor, scales: Tensor) -> Tensor:
    """What `packed4` rounded to: [..., N, K] in the dtype of the scales."""
    numbers = numbers4(weight, scales.shape[-1]).unflatten(-1, (scales.shape[-1], -1))
    return (numbers * scales.unsqueeze(-1)).flatten(-2)
