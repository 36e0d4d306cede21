"""Random numbers that are a function of what they are for, not of the order in which they are drawn."""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# What both hashes start from. The kernels start from the same two.
START = (33350994, 520022130)


def _mix(x: Tensor | int) -> Tensor | int:
    """A bijection of 32-bit integers (held in int64) with near-perfect avalanche.

    The shape and constants are those of the "lowbias32" hash (C. Wellons, hash-prospector).
    Products may wrap in int64; their low 32 bits, all that is kept, are exact.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def row_hash(row_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit hashes per row, [R] int64 in [0, 2^32).

    Args:
        row_keys: [R, K] int64, K at least 1, what tells one row from another: seed, prompt, position, step.
    """
    a, b = START
    for key in row_keys.unbind(-1):
        for half in (key & _LOW, key >> 32 & _LOW):
            a, b = (_mix(a ^ half) + 0x68BC21EB) & _LOW, (_mix(b ^ half) + 0x02E5BE93) & _LOW
    return a, b


def uniform(row_keys: Tensor, columns: int, start: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float32 [R, columns], a pure function of (row key, column).

    The columns are `start` to `start + columns - 1`. The smallest number is 2^-33 and the spacing near
    0 is 2^-32, so that a logarithm of it has a tail.
    """
    a, b = (x.unsqueeze(1) for x in row_hash(row_keys))
    column = torch.arange(start, start + columns, device=row_keys.device)
    bits = _mix(_mix((a + column) & _LOW) ^ b)
    # In float32 the largest of the sums is 2^32; the factor is just below 2^-32 and keeps it from giving 1.
    return (bits.float() + 0.5) * (2.0**-32 - 2.0**-56)


def gumbel(row_keys: Tensor, columns: int, start: int = 0) -> Tensor:
    """Standard Gumbel noise, float32 [R, columns]: argmax(logits + noise) samples the softmax."""
    return -torch.log(-torch.log1p(-uniform(row_keys, columns, start)))
