"""Checkpoint families: how a `config.json` becomes a `ModelSpec`, and how its tensors are named.

A family holds no arithmetic. What it can express and `models/transformer.py` cannot is refused by name, so a checkpoint
never loads into a network that computes something else.
"""

import re
from collections.abc import Mapping

from dkv.core.naming import instead
from dkv.models.families import (
    a2d,
    diffusion_gemma,
    dream,
    fast_dllm_v2,
    fields,
    llada,
    llada2,
    llada_moe,
    nemotron,
    sdar,
    sdar_moe,
    stable_diffcoder,
)
from dkv.models.families.base import Family

_MODULES = (llada, llada_moe, llada2, dream, sdar, sdar_moe, fast_dllm_v2, nemotron, stable_diffcoder, diffusion_gemma)
FAMILIES: dict[str, Family] = {f.name: f for f in (*(module.FAMILY for module in _MODULES), *a2d.FAMILIES)}

# Families that people ask for and that are not loaded, so that a refusal can name them: a pattern of `model_type` or of
# a class of `architectures`, in lower case and without anything but letters and digits -> the name of the family. The
# first that fits counts.
OTHERS = (
    (r"^llada2uni|^lladauni|^lladao", "LLaDA2.0-Uni (text and images)"),
    (r"^llada2(?!1?moe)", "LLaDA2.x, but for 2.0 and 2.1"),
    (r"^llavallada|^lladav", "LLaDA-V or LaViDa (text and images)"),
    (r"^llavadream|^dreamvl", "Dream-VL or LaViDa (text and images)"),
    (r"^sdarvl", "SDAR-VL (text and images)"),
    (r"^nemotronlabstwotower", "Nemotron-Labs-TwoTower"),
    (r"^wedlm", "WeDLM"),
    (r"^rnd1", "RND1"),
    (r"^opendcoder", "Open-dCoder"),
    (r"^tidar", "TiDAR"),
    (r"^diffullama|^diffugpt", "DiffuLLaMA"),
    (r"^bd3lm|^mdlm|^sedd|^udlm|^duo$", "MDLM, BD3-LM or a relative of theirs"),
    (r"^sumi", "Sumi"),
    (r"^lladaformultimodal|^luminadimoo", "Lumina-DiMOO (text and images)"),
    (r"^dimple", "Dimple (text and images)"),
    (r"^dyninomni", "Dynin-Omni (text, images and more)"),
)
# Fields of mixtures of experts, which the dense families lack.
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_intermediate_size")


def family_of(config: Mapping, named: str | None = None) -> Family:
    """The family that a configuration names by its `architectures`, or else by its `model_type`.

    Args:
        config: the content of `config.json`.
        named: the family, where the caller knows it; what the configuration calls itself is not looked at then.

    Raises:
        ValueError: neither is known, or they tell of a family that is not loaded; the message names it.
    """
    kind, classes = config.get("model_type"), fields.names(config, "architectures")
    stated = f"model_type is {kind!r}, architectures {classes}"
    experts = next((field for field in EXPERTS if fields.value(config, field) is not None), None)
    found = _recognised(kind, classes, stated, experts is not None) if named is None else FAMILIES.get(named)
    if found is None:
        raise ValueError(f"family={named!r} is not known: {instead(named, FAMILIES)}")
    if experts is not None and not found.is_mixture:
        raise ValueError(
            f"this is a mixture of experts ({experts}={config[experts]!r}), and the family {found.name} has none "
            f"({stated}); known are {_known()}"
        )
    return found


def _recognised(kind: object, classes: list[str], stated: str, experts: bool) -> Family:
    marked = [family for family in FAMILIES.values() if not family.unmarked]
    kind = kind.lower() if isinstance(kind, str) else ""
    by_class = [family for family in marked if set(classes) & set(family.architectures)]
    plain = [] if by_class else [re.sub(r"[^a-z0-9]", "", name.lower()) for name in (*classes, kind)]
    if other := next((other for pattern, other in OTHERS if any(re.search(pattern, name) for name in plain)), None):
        raise ValueError(
            f"this model is of the family {other}, which dkv does not load ({stated}); known are {_known()}"
        )
    if found := by_class or [family for family in marked if kind in family.model_types]:
        # LLaDA-MoE calls itself "llada" as well.
        return next((family for family in found if family.is_mixture == experts), found[0])
    hint = ""
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        hint = " (by its class it writes from left to right)"
    if unmarked := [family.name for family in FAMILIES.values() if family.unmarked and kind in family.model_types]:
        hint += f"; if it fills masks all the same, name its family (family={unmarked[0]!r})"
    raise ValueError(f"unknown model family: {stated}{hint}; known are {_known()}")


def _known() -> str:
    return "; ".join(
        f"{f.name} (model_type {', '.join(f.model_types)}; {', '.join(f.architectures)})"
        for f in FAMILIES.values()
        if not f.unmarked
    )
