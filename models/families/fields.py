"""Reading the fields of a `config.json`: every complaint names the field, what it holds and what it should."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

# The most of anything: what an index of 32 bits reaches.
MOST = torch.iinfo(torch.int32).max
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def value(config: Mapping, field: str, default=None):
    """A field that may be absent or null."""
    found = config.get(field)
    return default if found is None else found


def check(fits: bool, field: str, found: object, needed: str) -> None:
    """Raise ValueError with what is needed if what was found does not fit."""
    if not fits:
        shown = reprlib.repr(found) if isinstance(found, int | float) else repr(found)
        raise ValueError(f"the configuration has {field}={shown}; {needed}")


def only(supported: Mapping, config: Mapping) -> None:
    """Every field of `supported` is as it says there, of the same type, or absent."""
    for field, wanted in supported.items():
        found = value(config, field, wanted)
        check(type(found) is type(wanted) and found == wanted, field, found, f"only {wanted!r} is implemented")


def count(config: Mapping, field: str, default: int | None = None) -> int:
    """A whole number of at least 1."""
    found = value(config, field, default)
    _there(field, found)
    check(type(found) is int and found >= 1, field, found, "a whole number of at least 1 is needed")
    check(found <= MOST, field, found, f"a whole number of at most {MOST} is needed")
    return found


def positive(config: Mapping, field: str, default: float | None = None) -> float:
    """A number above 0 with which float32 can compute."""
    found = value(config, field, default)
    _there(field, found)
    check(type(found) in (int, float) and found > 0, field, found, "a number above 0 is needed")
    bounds = f"a number between {SMALLEST:.3g} and {LARGEST:.3g}, which float32 can hold, is needed"
    check(SMALLEST <= found <= LARGEST, field, found, bounds)
    return float(found)


def _there(field: str, found: object) -> None:
    if found is None:
        raise ValueError(f"the configuration lacks {field!r}: take config.json from the same place as the weights")


def optional(read: Callable) -> Callable[[Mapping, str, Any], Any]:
    """A reader that gives None where the field is absent and has no default."""
    return lambda config, field, default=None: (
        None if value(config, field, default) is None else read(config, field, default)
    )


def flag(config: Mapping, field: str, default: bool) -> bool:
    """True or false, and nothing that merely counts as one of them."""
    found = value(config, field, default)
    check(type(found) is bool, field, found, "true or false is needed")
    return found


def names(config: Mapping, field: str) -> list[str]:
    """A list of names, which may be absent."""
    found = value(config, field, [])
    fits = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    check(fits, field, found, "a list of names or null is needed")
    return list(found)


def share(config: Mapping, whole_field: str, parts_field: str) -> int:
    """One field divided by another, without a remainder."""
    whole, parts = count(config, whole_field), count(config, parts_field)
    if whole % parts:
        raise ValueError(f"the configuration has {whole_field}={whole}, not a multiple of {parts_field}={parts}")
    return whole // parts


def token_ids(config: Mapping, usual: Mapping[str, int], rows: int) -> dict[str, int | None]:
    """The special tokens of a `ModelSpec`, all below `rows`; `usual` are those that a file may leave out."""
    eos = _token_id(config, "eos_token_id", usual.get("eos_token_id"), rows)
    defaults = {"mask_token_id": None, "eos_token_id": eos, "eot_token_id": None, "pad_token_id": eos, **usual}
    found = {field: _token_id(config, field, default, rows) for field, default in defaults.items()}
    if found["mask_token_id"] is None:
        raise ValueError(
            f"the configuration has no mask_token_id, and a vocabulary of {rows} has no usual one: "
            "add the id of the mask token to config.json, or pass mask_token_id="
        )
    return found


def _token_id(config: Mapping, field: str, default: int | None, rows: int) -> int | None:
    """A token id, or the first of a list of them."""
    return next(iter(listed_ids(config, field, rows)), default)


def listed_ids(config: Mapping, field: str, rows: int) -> list[int]:
    """Token ids below `rows`: a list of them, a single one, or none."""
    found = config.get(field)
    listed = list(found) if isinstance(found, list | tuple) else [] if found is None else [found]
    if not all(type(one) is int and 0 <= one < rows for one in listed):
        raise ValueError(
            f"the configuration has {field}={found!r}, but the model has {rows} tokens: correct config.json, "
            "or take it from the same place as the weights"
        )
    return listed


def rope_parameters(config: Mapping) -> tuple[dict[str, Any], list[Any]]:
    """What stands in `rope_parameters` (transformers 5) or `rope_scaling`, without null; and the kinds it names."""
    nested: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        part = value(config, field, {})
        check(isinstance(part, Mapping), field, part, "an object or null is needed")
        nested.update({k: v for k, v in part.items() if v is not None})
    return nested, [nested.pop(key) for key in ("rope_type", "type") if key in nested]


def rope_theta(config: Mapping, default: float | None = None) -> float:
    """The rotary base, nested or `rope_theta` itself, of rotary embeddings that are not changed otherwise."""
    nested, kinds = rope_parameters(config)
    theta = nested.pop("rope_theta", None)
    if nested or any(kind != "default" for kind in kinds):
        asked = ", ".join([*(f"rope_type={k!r}" for k in kinds), *(f"{k}={v!r}" for k, v in nested.items())])
        raise ValueError(
            f"the configuration changes its rotary embedding (rope_scaling or rope_parameters: {asked}); "
            "only rope_type='default' with a rope_theta is implemented"
        )
    return positive(config if theta is None else {"rope_theta": theta}, "rope_theta", default)
