"""Temperatures, also such as overflow."""

import torch
from torch import Tensor


def computable(temperature: float, dtype: torch.dtype) -> float:
    """A temperature that numbers of this dtype can be multiplied with and divided by."""
    return min(max(temperature, torch.finfo(dtype).tiny), torch.finfo(dtype).max)


def shares(temperature: float, dtype: torch.dtype) -> tuple[float, float]:
    """What a value and its noise are multiplied with before they are added: 1 / temperature and 1, or both times it.

    Neither overflows. As the temperature goes below what tells two values apart, the larger one wins, and the first
    of equal ones.
    """
    temperature = computable(temperature, dtype)
    return (1.0, temperature) if temperature < 1 else (max(1 / temperature, torch.finfo(dtype).tiny), 1.0)


def tempered(x: Tensor, temperature: float) -> Tensor:
    """(x - the largest of a row) / temperature: what may overflow counts for nothing."""
    top = x.amax(-1, keepdim=True)
    return (x - top.masked_fill(top.isinf(), 0)) / computable(temperature, x.dtype)
