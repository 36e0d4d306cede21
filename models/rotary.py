"""What positions do to queries and keys: rotary frequencies and the scale of queries, as data."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def frequencies(theta: float, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """By how much a pair of features turns from one slot to the next: theta^(-2j / width), [width / 2] in radians."""
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.int64).to(dtype)
    return 1.0 / theta ** (exponent / width)


def _check(name: str, value: float, least: float = 0.0) -> None:
    if not least < value < math.inf:
        raise ValueError(f"{name} must be a finite number above {least:g}, got {value}")


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., 2023, section 3.2): features that turn slowly do so `factor` times slower, fast ones as ever.

    Attributes:
        factor: of the slow features; below 1 they turn faster.
        original: length of the texts that the model was trained on first, in slots.
        beta_fast, beta_slow: turns within that length above which a feature is fast, and below which it is slow;
            between them the factor grows evenly from feature to feature.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        for name in ("factor", "original", "beta_fast", "beta_slow"):
            _check(name, getattr(self, name))

    def changed(self, plain: Tensor, theta: float) -> Tensor:
        """The frequencies [width / 2] of plain ones to the base theta, which is above 1."""
        width = 2 * len(plain)

        def feature(turns: float) -> float:
            return width * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(theta))

        low = max(math.floor(feature(self.beta_fast)), 0)
        high = min(math.ceil(feature(self.beta_slow)), width - 1)
        place = torch.arange(len(plain), device=plain.device, dtype=plain.dtype)
        slow = ((place - low) / ((high - low) or 0.001)).clamp(0, 1)
        return plain * (1 - slow) + plain / self.factor * slow


@dataclass(frozen=True)
class Proportional:
    """Only the first pairs of features turn, as many as `share` of all; the others stand still (Gemma 4)."""

    share: float

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    def changed(self, plain: Tensor, theta: float) -> Tensor:
        """The frequencies [width / 2] of plain ones."""
        turning = torch.arange(len(plain), device=plain.device) < int(self.share * len(plain))
        return plain.where(turning, 0.0)


@dataclass(frozen=True)
class QueryScale:
    """Rotated queries times 1 + beta ln(1 + floor(position / original)), as in Llama 4 and Ministral 3.

    Attributes:
        beta: how fast it grows.
        original: slots before which nothing changes.
    """

    beta: float
    original: int

    def __post_init__(self):
        _check("beta", self.beta)
        _check("original", self.original)

    def table(self, length: int, device: torch.device) -> Tensor:
        """float32 [length], by position."""
        times = torch.arange(length, device=device).div(self.original, rounding_mode="floor")
        return 1 + self.beta * torch.log1p(times.float())
