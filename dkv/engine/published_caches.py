"""The caches of dKV-Cache and Fast-dLLM under the names of their code."""

from collections.abc import Mapping
from typing import Any

from dkv.core.validation import flag
from dkv.policies import policy_of

# What the codes of dKV-Cache (LLaDA; Dream) and of Fast-dLLM call their caches, and their arguments.
_SWITCHES = ("enable_cache", "use_cache")
_ARGUMENTS = {
    "cache_reloading_step": "refresh",
    "cache_steps": "refresh",
    "window_size": "window",
    "shift_type": "shift_rule",
}
_TYPES = {"decoded": "decode", "prefill": "prefill", "pd": "pd"}
CACHE_NAMES = (*_SWITCHES, *_ARGUMENTS, "cache_type", "dual_cache")
_TAKES = {"decode": ("refresh", "shift_rule"), "greedy": ("refresh", "window"), "pd": ("refresh", "shift_rule")}


def choose_policy(given: dict[str, Any], current: str) -> None:
    """Put the policy that published names ask for in their place, among canonical settings.

    Raises:
        ValueError: they contradict each other, or the policy beside them.
    """
    asked = {name: value for name in CACHE_NAMES if (value := given.pop(name, None)) is not None}
    if asked and given.get("cache") is None:
        found = published_policy(asked, current)
        given.update({} if found is None else {"cache": found})
    elif asked:
        # A switch may stand beside a policy that it agrees with.
        on = policy_of(given["cache"]).name != "none"
        if wrong := [name for name, value in asked.items() if name not in _SWITCHES or value is not on]:
            name = wrong[0]
            raise ValueError(f"{name}={asked[name]!r} does not go with cache={given['cache']!r}: give one of them")


def published_policy(given: Mapping[str, Any], current: str) -> dict[str, Any] | None:
    """The cache policy that published names ask for, as a dict; None: they leave the one there is.

        enable_cache=True (dKV-Cache, LLaDA)               decode; with window_size greedy
        use_cache=True, cache_type="decoded"|"prefill"|"pd" (dKV-Cache, Dream)       decode, prefill, pd
        use_cache=True, dual_cache=False|True, or dual_cache=True (Fast-dLLM)        prefix, dual
        False for a switch                                 none, whatever stands beside it

    Their arguments are cache_reloading_step (1 where it is left out, as published) and cache_steps, our refresh;
    window_size, our window; and shift_type, our shift_rule.

    Args:
        given: settings of `CACHE_NAMES`, not None.
        current: the name of the policy that is set.

    Raises:
        ValueError: they do not say which policy, or two of them disagree.
    """
    for name in (*_SWITCHES, "dual_cache"):
        flag(name, given.get(name, True))
    switches = {given[name] for name in _SWITCHES if name in given}
    if len(switches) > 1:
        raise ValueError("enable_cache and use_cache contradict each other: give one of them")
    if switches == {False} or given == {"dual_cache": False}:
        return {"name": "none"}
    if given.get("window_size") == 0:
        raise ValueError(
            "window_size=0 does not say which cache, as published scripts hand it to both: leave it out for that of "
            "dkv.DecodeCache, or give cache=dkv.GreedyCache(window=0)"
        )
    kinds = _kinds(given)
    if not switches and not given.get("dual_cache"):
        raise ValueError(f"{next(iter(given))} goes with enable_cache=True or use_cache=True; or give cache=")
    if not kinds:
        if len(given) == 1 and current != "none":
            return None
        raise ValueError(
            "use_cache=True does not say which cache: give cache_type='decoded', 'prefill' or 'pd' beside it "
            "(dKV-Cache), dual_cache=False or True (Fast-dLLM), or cache= instead, such as dkv.DecodeCache(refresh=8)"
        )
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{' and '.join(kinds)} are of different caches: give one of them")
    kind = next(iter(kinds.values()))
    return {"name": kind, **_arguments(given, kind)}


def _kinds(given: Mapping[str, Any]) -> dict[str, str]:
    """The names that say which policy it is, and which they say."""
    kinds = {}
    if "cache_type" in given:
        if not isinstance(given["cache_type"], str) or given["cache_type"] not in _TYPES:
            raise ValueError(f"cache_type must be one of {', '.join(_TYPES)}, got {given['cache_type']!r}")
        kinds["cache_type"] = _TYPES[given["cache_type"]]
    if "dual_cache" in given:
        kinds["dual_cache"] = "dual" if given["dual_cache"] else "prefix"
    if "window_size" in given:
        kinds["window_size"] = "greedy"
    elif "enable_cache" in given:
        kinds["enable_cache"] = "decode"
    return kinds


def _arguments(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The arguments of the policy; of names that stand for the same one, the values must agree."""
    found: dict[str, Any] = {"refresh": 1} if "enable_cache" in given and "cache_steps" not in given else {}
    told: dict[str, str] = {}
    for name, own in _ARGUMENTS.items():
        if name not in given:
            continue
        # Prefill never refreshes, and holds the same slots by every rule: the published scripts hand both on.
        if kind == "prefill" and (name == "shift_type" or (name == "cache_steps" and given[name] == 0)):
            continue
        if own not in _TAKES.get(kind, ()):
            raise ValueError(f"{name}={given[name]!r} does not go with the {kind!r} cache, which has no {own}")
        if own in told and found[own] != given[name]:
            raise ValueError(f"{name}={given[name]!r} contradicts {told[own]}={found[own]!r}: give one of them")
        found[own], told[own] = given[name], name
    return found
