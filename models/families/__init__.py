"""Checkpoint families: how a `config.json` becomes a `ModelSpec`, and how its tensors are named.

A family holds no arithmetic. What it can express and `models/transformer.py` cannot is
refused by name, so a checkpoint never loads into a network that computes something else.
"""

from collections.abc import Mapping

from dkv.models.families import dream, fields, llada
from dkv.models.families.base import Family
from dkv.models.families.others import EXPERTS, other_family

FAMILIES: dict[str, Family] = {family.name: family for family in (llada.FAMILY, dream.FAMILY)}


def family_of(config: Mapping) -> Family:
    """The family that a configuration names by its `architectures`, or else by its `model_type`.

    Raises:
        ValueError: neither is known, or they tell of a family that is not loaded; the message names it.
    """
    kind, classes = config.get("model_type"), fields.names(config, "architectures")
    stated = f"model_type is {kind!r}, architectures {classes}"
    known = "; ".join(
        f"{f.name} (model_type {', '.join(f.model_types)}; {', '.join(f.architectures)})" for f in FAMILIES.values()
    )
    kind = kind.lower() if isinstance(kind, str) else ""
    by_class = [family for family in FAMILIES.values() if set(classes) & set(family.architectures)]
    other = None if by_class else other_family([*classes, kind])
    if other is not None:
        raise ValueError(f"this model is of the family {other}, which dkv does not load ({stated}); known are {known}")
    found = by_class or [family for family in FAMILIES.values() if kind in family.model_types]
    if not found:
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
        hint = " (by its class it writes from left to right)" if causal else ""
        raise ValueError(f"unknown model family: {stated}{hint}; known are {known}")
    if experts := next((field for field in EXPERTS if fields.value(config, field) is not None), None):
        raise ValueError(
            f"this is a mixture of experts ({experts}={config[experts]!r}), such as LLaDA-MoE, which dkv does not load "
            f"({stated}); known are {known}"
        )
    return found[0]
