"""From the words of lm-eval's tasks and `--model_args` to a `dkv.DiffusionConfig`."""

import logging
from dataclasses import fields
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from dkv.config import DiffusionConfig
from dkv.policies import POLICIES
from dkv.published_names import own_name

# Slots of an answer where neither task nor model_args say: what lm-eval's other models have.
NEW_TOKENS = 256
# What the number of slots and the temperature may be called, or follow from, in a task.
WORDS = {
    "max_gen_toks": "max_new_tokens", "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
}  # fmt: skip
POLICY_OPTIONS = {field.name for policy in POLICIES.values() for field in fields(policy)}

_LENGTH = "max_length counts the prompt, too, and dkv needs the slots to fill: give max_gen_toks"

log = logging.getLogger(__name__)


def count(name: str, value: int | str) -> int:
    """A number of at least 1, which lm-eval may hand on as text."""
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def stated(settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings under the names of `DiffusionConfig`.

    Args:
        settings: under any name that `DiffusionConfig` knows; options of the policy beside `cache`.

    Raises:
        ValueError: an unknown name, or an impossible value.
    """
    plain = _with_policy(settings)
    for name, value in plain.items():
        if isinstance(value, list | tuple) and name not in ("eos_token_id", "eot_token_id"):
            raise ValueError(f"{name} must be one value for all requests, got {value!r}")
    if plain.get("max_length") is not None:
        raise ValueError(_LENGTH)
    if plain.get("seed", 0) is None:
        raise ValueError("seed must be a whole number; leave it out to take that of lm-eval")
    names = {own_name(name) for name in plain}
    # One slot: whether steps and blocks go with the length is seen when that is known.
    config = DiffusionConfig(**plain if "max_new_tokens" in names else {"max_new_tokens": 1, **plain})
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def task_config(asked: dict[str, Any], first: dict[str, Any], spec: Any) -> tuple[DiffusionConfig, list[str]]:
    """The settings and the stop strings of a task.

    Args:
        asked: `generation_kwargs` of the task with those of `--gen_kwargs`.
        first: from `stated`; these go before what is asked for, with a warning where they differ.
        spec: of the model.

    Raises:
        ValueError: settings that are unknown or do not go together, or more slots than the model has.
    """
    if "max_length" in asked:
        raise ValueError(_LENGTH)
    task = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
    until, new, sampled = (task.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    if sampled:
        task.setdefault("temperature", 1.0)
    task = {"max_new_tokens": new, **stated(task)}
    told = {WORDS.get(name, own_name(name)) for name in _with_policy(asked)}
    for name in sorted(told & first.keys() & task.keys()):
        if task[name] != first[name]:
            log.warning("%s: %r of model_args is used, not %r of the task", name, first[name], task[name])
    config = DiffusionConfig(**{**task, **first})
    config.cache.check(spec.shifted)
    if config.max_new_tokens >= spec.max_positions:
        raise ValueError(
            f"{config.max_new_tokens} new tokens leave no room for a prompt: the model has {spec.max_positions} "
            "positions; give model_args max_new_tokens=N"
        )
    config.check_steps(spec.shifted)
    return config, [stop for stop in until if stop]


def _with_policy(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, where options of the policy have become a part of `cache`."""
    plain = {name: value for name, value in settings.items() if name not in POLICY_OPTIONS}
    options = {name: value for name, value in settings.items() if name in POLICY_OPTIONS}
    if options:
        cache = plain.get("cache") or "none"
        plain["cache"] = {**(cache if isinstance(cache, dict) else {"name": cache}), **options}
    return plain
