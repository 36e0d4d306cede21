"""The rules by which a step fills as many slots as it is sure of: their settings, and what the commit is told."""

import math
from typing import Any

import torch

from dkv.engine.settings import DEFAULTS, ENTROPY_FORMS
from dkv.kernels.commit.reference import Rules

# Each of these settings is a rule of its own.
BOUNDS = ("threshold", "factor", "entropy_bound")
# What a setting acts on, without which it has to keep its default.
PARTS = {
    "threshold_decay": "threshold",
    "near_threshold": "threshold",
    "radius": "near_threshold",
    "entropy_form": "entropy_bound",
}
FORMS = dict(zip(ENTROPY_FORMS, ("entropy", "entropy_sum"), strict=True))


def given(config: Any) -> list[str]:
    """Those of `BOUNDS` that a configuration has."""
    return [name for name in BOUNDS if getattr(config, name) is not None]


def check(config: Any) -> None:
    """Raise ValueError where the settings of the rules do not go together, or with the others."""
    for name, whole in PARTS.items():
        value = getattr(config, name)
        if value != DEFAULTS[name] and getattr(config, whole) is None:
            raise ValueError(f"{name}={value!r} is a part of {whole}, and acts on nothing without it: give {whole}=")
    names = given(config)
    if not names:
        return
    name = names[0]
    if len(names) > 1:
        raise ValueError(f"{name} and {names[1]} are two rules for the same thing: give one of them")
    if config.is_ordered or (name == "factor" and config.confidence == "entropy"):
        raise ValueError(f"{name} needs a confidence to go by, which confidence={config.confidence!r} does not give")
    if config.selection_temperature > 0:
        raise ValueError(f"{name} fills the surest slots, selection_temperature draws them: give one of them")
    low, high = (-math.inf, 0) if config.confidence == "entropy" else (0, 1)
    for name in ("threshold", "near_threshold"):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high and abs(value) < 1e38):
            with_what = f"confidence={config.confidence!r}, got {value!r}"
            raise ValueError(f"{name} must be between {low} and {high} with {with_what}")
    if config.near_threshold is not None and config.near_threshold > config.threshold:
        at_most = f"threshold ({config.threshold}), got {config.near_threshold}"
        raise ValueError(f"near_threshold, for slots beside those that reach threshold, must be at most {at_most}")


def sureness(config: Any) -> Rules:
    """The rule by which slots are sure enough, without the ends of rows."""
    rules = Rules(finite_only=config.confidence_eos_eot_inf)
    if config.threshold is not None:
        bound = _compared(config.threshold, config)
        if config.near_threshold is None:
            return rules._replace(rule="threshold", bound=bound)
        near = _compared(config.near_threshold, config)
        return rules._replace(rule="near", bound=bound, near=near, radius=config.radius)
    if config.factor is not None:
        return rules._replace(rule="factor", bound=config.factor)
    if config.entropy_bound is not None:
        return rules._replace(rule=FORMS[config.entropy_form], bound=config.entropy_bound)
    return rules


def _compared(threshold: float, config: Any) -> float:
    """A threshold as confidences are kept: as logarithms, but for entropies."""
    if config.confidence != "entropy":
        threshold = math.log(threshold) if threshold > 0 else -math.inf
    return max(threshold, torch.finfo(torch.float32).min)
