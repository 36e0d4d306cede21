"""What the values of settings may be, as tables; `DiffusionConfig.validate` applies them."""

from typing import Any

INFINITY = float("inf")
# Whole numbers: the least one (None: any), and whether the setting may be None, and a list.
WHOLE: dict[str, tuple[int | None, bool, bool]] = {
    "max_new_tokens": (0, False, True),
    "steps": (1, True, True),
    "seed": (None, True, True),
    "eos_token_id": (0, True, True),
    "block_length": (1, True, False),
    "top_k": (1, True, False),
    "pad_token_id": (0, True, False),
    "mask_token_id": (0, True, False),
    "vocab_limit": (1, True, False),
}
# Finite numbers from 0: the greatest one, and whether the setting may be None.
NUMBERS: dict[str, tuple[float, bool]] = {
    "temperature": (INFINITY, False),
    "selection_temperature": (INFINITY, False),
    "cfg_scale": (INFINITY, False),
    "eps": (1, False),
    "top_p": (1, True),
    "factor": (INFINITY, True),
}


def check_numbers(settings: Any) -> None:
    """Raise ValueError where a number is none, or impossible, naming the setting and what it may be."""
    for name, (low, optional, several) in WHOLE.items():
        value = getattr(settings, name)
        if value is None and optional:
            continue
        listed = isinstance(value, list) and several
        for number in value if listed else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or (low is not None and number < low):
                least = "" if low is None else f" of at least {low}"
                a_list = ", or a list of them" if listed else ""
                raise ValueError(f"{name} must be a whole number{least}{a_list}, got {value!r}")
    for name, (high, optional) in NUMBERS.items():
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise ValueError(f"{name} must be between 0 and {high}, got {value!r}")
        if value == INFINITY:
            raise ValueError(f"{name} must be a finite number, got {value!r}")
