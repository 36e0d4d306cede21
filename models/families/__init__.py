"""Checkpoint families: how a `config.json` becomes a `ModelSpec`, and how its tensors are named.

A family holds no arithmetic. What it can express and `models/transformer.py` cannot is refused by name, so a checkpoint
never loads into a network that computes something else.
"""

import re
from collections.abc import Mapping

from dkv.models.families import dream, fields, llada
from dkv.models.families.base import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (llada.FAMILY, dream.FAMILY)}

# Families that people ask for and that are not loaded, so that a refusal can name them: a pattern of `model_type` or of
# a class of `architectures`, in lower case and without anything but letters and digits -> the name of the family. The
# first that fits counts.
OTHERS = (
    (r"^lladamoe", "LLaDA-MoE"),
    (r"^llada2uni|^lladauni|^lladao", "LLaDA2.0-Uni (text and images)"),
    (r"^llada2", "LLaDA2.x"),
    (r"^llavallada|^lladav", "LLaDA-V or LaViDa (text and images)"),
    (r"^llavadream|^dreamvl", "Dream-VL or LaViDa (text and images)"),
    (r"^sdarvl", "SDAR-VL (text and images)"),
    (r"^sdar|^trado", "SDAR"),
    (r"^fastdllm", "Fast-dLLM v2"),
    (r"^a2d", "A2D (dllm)"),
    (r"^nemotronlabsdiffusion|^nemotrondiffusion", "Nemotron-Labs-Diffusion"),
    (r"^nemotronlabstwotower", "Nemotron-Labs-TwoTower"),
    (r"^diffusiongemma", "DiffusionGemma"),
    (r"^wedlm", "WeDLM"),
    (r"^rnd1", "RND1"),
    (r"^stablediffcoder", "Stable-DiffCoder"),
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
    plain = [] if by_class else [re.sub(r"[^a-z0-9]", "", name.lower()) for name in (*classes, kind)]
    if other := next((other for pattern, other in OTHERS if any(re.search(pattern, name) for name in plain)), None):
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
