"""What the values of settings may be, as tables; `DiffusionConfig` and the policies apply them."""

from typing import Any

import numpy as np
from torch import Tensor

# No count or id is larger: what is asked for beyond is a slip, and kernels hold ids and counts in 32 bits.
MOST = 2**31 - 1
# Whole numbers: the least and the greatest one, and whether the setting may be None, and a list.
WHOLE: dict[str, tuple[int, int, bool, bool]] = {
    "max_new_tokens": (0, MOST, False, True),
    "steps": (1, MOST, True, True),
    # The seeds that torch takes: others would be folded into these.
    "seed": (-(2**63), 2**64 - 1, True, True),
    "eos_token_id": (0, MOST, True, True),
    "eot_token_id": (0, MOST, True, True),
    "max_length": (1, MOST, True, False),
    "block_length": (1, MOST, True, False),
    "top_k": (1, MOST, True, False),
    "pad_token_id": (0, MOST, True, False),
    "mask_token_id": (0, MOST, True, False),
    "vocab_limit": (1, MOST, True, False),
}
# Numbers from 0: the greatest one, and whether the setting may be None.
NUMBERS: dict[str, tuple[float, bool]] = {
    "temperature": (10**6, False),
    "selection_temperature": (10**6, False),
    "cfg_scale": (10**6, False),
    "eps": (1, False),
    "top_p": (1, True),
    "factor": (10**6, True),
}
FLAGS = (
    "output_history", "output_active", "output_confidences", "output_logits", "logits_eos_inf",
    "confidence_eos_eot_inf",
)  # fmt: skip


def plain(value: Any) -> Any:
    """Scalars of numpy and torch as numbers, arrays, tensors and tuples of any depth as lists; others as they are."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def whole(name: str, value: Any, low: int, high: int = MOST, listed: list | None = None) -> int:
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


def flag(name: str, value: Any) -> bool:
    """A value that is True or False; ValueError if it is neither."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_types(settings: Any) -> None:
    """Raise ValueError where a number or a switch is none, or impossible, naming the setting and what it may be."""
    for name, (low, high, optional, several) in WHOLE.items():
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if isinstance(value, list) and several:
            if not value:
                raise ValueError(f"{name} is an empty list: give one number, or one for every row")
            for number in value:
                whole(name, number, low, high, value)
        else:
            whole(name, value, low, high)
    for name, (high, optional) in NUMBERS.items():
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise ValueError(f"{name} must be between 0 and {high}, got {value!r}")
    for name in FLAGS:
        flag(name, getattr(settings, name))
