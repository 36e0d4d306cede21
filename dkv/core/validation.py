"""Checks of single values, for settings and for arguments of policies."""

from typing import Any

import numpy as np
from torch import Tensor

# No count or id is larger: what is asked for beyond is a slip, and kernels hold ids and counts in 32 bits.
MOST = 2**31 - 1


def plain(value: Any) -> Any:
    """Scalars of numpy and torch as numbers, arrays, tensors and tuples of any depth as lists; others as they are."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def whole(name: str, value: Any, low: int, high: float = MOST, listed: list | None = None) -> int:
    """A whole number, as an int; `listed` is the list that it is from.

    Raises:
        ValueError: it is none, or out of range.
    """
    number, found = plain(value), value if listed is None else listed
    if isinstance(number, bool) or not isinstance(number, int) or number < low:
        # Negative ones are only seeds: their range is of interest where it is left.
        least = f" of at least {low}" if low >= 0 or type(number) is int else ""
        several = ", or a list of them" if listed else ""
        raise ValueError(f"{name} must be a whole number{least}{several}, got {found!r}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}, got {found!r}")
    return number


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`, as it is; ValueError if it is none."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float) or not low <= found <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {found!r}")
    return found


def flag(name: str, value: Any) -> bool:
    """A value that is True or False; ValueError if it is neither."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value
