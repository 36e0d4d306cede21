"""Cache policies: rules for the slots that a step computes."""

from dataclasses import fields
from typing import Any

from dkv.core.naming import instead, nearest
from dkv.policies.base import Policy, View
from dkv.policies.dkv_cache import DecodeCache, GreedyCache, NoCache, PrefillCache, PrefillDecodeCache
from dkv.policies.elastic import ElasticCache
from dkv.policies.fast_dllm import DualCache, PrefixCache
from dkv.policies.rollout import Rollout
from dkv.policies.skip import SkipCache
from dkv.policies.sliding import SlidingCache
from dkv.policies.suffix import SuffixWindow

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        *(NoCache, DecodeCache, GreedyCache, PrefillCache, PrefillDecodeCache, PrefixCache, DualCache),
        *(SuffixWindow, SlidingCache, Rollout, ElasticCache, SkipCache),
    )
}

# The options of all policies, each once.
POLICY_OPTIONS = tuple(dict.fromkeys(field.name for policy in POLICIES.values() for field in fields(policy)))


def joined_policy(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a generation in which options of the policy, given beside `cache`, have become a part of it."""
    options = {name: value for name, value in settings.items() if name in POLICY_OPTIONS}
    plain = {name: value for name, value in settings.items() if name not in options}
    if options:
        cache = plain.get("cache") or "none"
        plain["cache"] = {**(cache if isinstance(cache, dict) else {"name": cache}), **options}
    return plain


def policy_of(value: Any) -> Policy:
    """A policy from itself, its name, a dict {"name": ..., **arguments}, or None for `NoCache`.

    Raises:
        ValueError: no such policy, or no such argument.
    """
    if value is None:
        return NoCache()
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise ValueError(f"cache must be a policy, its name or a dict, got {value!r}")
    name, arguments = value.get("name"), {k: v for k, v in value.items() if k != "name"}
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"cache: unknown policy {name!r}; {instead(name, POLICIES)}")
    known = {f.name for f in fields(POLICIES[name])}
    if unknown := sorted(map(str, set(arguments) - known)):
        takes = ", ".join(sorted(known)) or "no arguments"
        near = None if unknown[0] in POLICY_OPTIONS else nearest(unknown[0], known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"cache: policy {name!r} has no {', '.join(unknown)}{hint}; it takes {takes}")
    return POLICIES[name](**arguments)


__all__ = ["POLICIES", "POLICY_OPTIONS", "Policy", "View", "joined_policy", "policy_of"]
__all__ += [policy.__name__ for policy in POLICIES.values()]
