"""Ways to generate, written as text: settings and arguments of a policy, with lists that are multiplied out."""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import dkv
from dkv.bench.lineup import LINEUP, PLAIN
from dkv.core.naming import instead
from dkv.engine.published_names import ALIASES, own_name
from dkv.engine.settings import DEFAULTS
from dkv.policies import POLICY_OPTIONS, policy_of

# Steps by name, as a share of the slots to fill.
SHARES = {"all": 1.0, "half": 0.5, "third": 1 / 3, "quarter": 0.25}

SETTINGS = (
    "block_length",
    "schedule",
    "most",
    "eps",
    "confidence",
    "confidence_dtype",
    "temperature",
    "top_p",
    "top_k",
    "selection_temperature",
    "threshold",
    "threshold_decay",
    "certainty",
    "near_threshold",
    "radius",
    "factor",
    "entropy_bound",
    "entropy_form",
    "cfg_scale",
    "kv_cache_dtype",
)
NAMES = ("cache", "steps", "weights", *SETTINGS)
# Weights that a run may name, by the arguments of `dkv.load` that ask for them; others than those of the measurement.
WEIGHTS = {
    **{bits: {"weights": bits} for bits in ("int8", "int4")},
    **{f"{bits}_keep_head": {"weights": bits, "keep_head": True} for bits in ("int8", "int4")},
    "bfloat16": {"dtype": "bfloat16"},
}
# How a setting is written in a label; others as name=value.
LABELS = dict.fromkeys(("refresh", "window_center", "shift_rule", "confidence"), "{}")
LABELS |= {"kv_cache_dtype": "K/V {}", "window": "w{}", "temperature": "t{}", "block_length": "b{}"}


@dataclass(frozen=True)
class Contender:
    """One way to generate.

    Attributes:
        label: short and unique.
        settings: of `dkv.DiffusionConfig`, but for `steps`.
        policy: name of the cache policy.
        steps: passes; a float is a share of the slots to fill; None: one per slot.
        weights: of `WEIGHTS`; None: those of the measurement.
    """

    label: str
    settings: dict[str, Any]
    policy: str
    steps: int | float | None = None
    weights: str | None = None

    def same_as(self, other: "Contender") -> bool:
        """Whether both do the same, whatever they are called."""
        return (self.settings, self.steps, self.weights) == (other.settings, other.steps, other.weights)

    def settings_for(self, new: int) -> dict[str, Any]:
        """Settings of `dkv.generate` for so many new slots."""
        steps = max(1, round(self.steps * new)) if isinstance(self.steps, float) else self.steps
        return {"max_new_tokens": new, "steps": steps, **self.settings}


def of_lineup(name: str) -> Contender:
    """The contender of the line-up that has this name, which is its label."""
    return replace(contenders([LINEUP[name]])[-1], label=name)


def contenders(runs: Sequence[str]) -> list[Contender]:
    """The contenders that texts of the form `cache=decode refresh=2,4,8 steps=all,half` describe.

    A name is one of a policy's arguments or a setting of `dkv.DiffusionConfig`; `steps` also takes a share
    of the slots, such as half or 0.25. The first is always plain decoding. What is named twice, in whatever
    words, is run once, under the first of its labels.

    Raises:
        ValueError: no such setting, or a value that it cannot have; the message holds the text.
    """
    found = [Contender(PLAIN, {"cache": dkv.NoCache()}, "none")]
    for text in runs:
        try:
            axes = [_axis(word) for word in text.split()]
            names = [name for name, _ in axes]
            if again := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{again[0]} is named twice: give its values as {again[0]}=value,value")
            for values in itertools.product(*(values for _, values in axes)):
                contender = _contender(dict(zip(names, values, strict=True)))
                if not any(contender.same_as(other) for other in found):
                    found.append(contender)
        except ValueError as error:
            raise ValueError(f"--run {text!r}: {error}") from error
    return found


def _axis(word: str) -> tuple[str, list[Any]]:
    name, sign, values = word.partition("=")
    if not sign or not name or "" in values.split(","):
        raise ValueError(f"{word!r} is not of the form name=value or name=value,value")
    return name, [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    """A number, a switch, nothing, or else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _contender(asked: dict[str, Any]) -> Contender:
    given = dict(asked)
    steps = given.pop("steps", None)
    steps = SHARES.get(steps, steps)
    if isinstance(steps, str) or (isinstance(steps, float) and not 0 < steps <= 1):
        raise ValueError(f"steps must be a whole number, a share up to 1, or {', '.join(SHARES)}, got {steps!r}")
    weights = given.pop("weights", None)
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    name = given.pop("cache", "none")
    arguments = {key: given.pop(key) for key in list(given) if key in POLICY_OPTIONS}
    policy = policy_of({"name": name, **arguments})
    names = {own_name(key) for key in given}
    if fixed := sorted(names & set(DEFAULTS) - set(SETTINGS)):
        raise ValueError(f"{fixed[0]} cannot differ between runs; what can: steps, {', '.join(SETTINGS)}")
    if odd := [key for key in given if key not in (*DEFAULTS, *ALIASES)]:
        raise ValueError(f"unknown setting {odd[0]!r}; {instead(odd[0], NAMES, (*ALIASES, *POLICY_OPTIONS))}")
    # Names of either family's functions become ours here, so that one setting has one label.
    config = dkv.DiffusionConfig(**given, steps=None if isinstance(steps, float) else steps)
    settings = {key: value for key, value in config.to_diff_dict().items() if key in SETTINGS}
    words = [LABELS.get(key, f"{key}={{}}").format(value) for key, value in {**arguments, **settings}.items()]
    words += [] if weights is None else [weights]
    if steps not in (None, 1.0):
        words.append(next((word for word, share in SHARES.items() if share == steps), f"steps {steps}"))
    label = " ".join([PLAIN if name == "none" else name, *words])
    return Contender(label, {**settings, "cache": policy}, name, None if steps == 1.0 else steps, weights)
