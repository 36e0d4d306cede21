"""Model families that people ask for and that dkv does not load, so that a refusal can name them."""

import re
from collections.abc import Iterable

# A pattern of `model_type` or of a class of `architectures`, in lower case and without anything but letters and digits,
# -> the name of the family. The first that fits counts.
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


def other_family(names: Iterable[str]) -> str | None:
    """The known family that one of the names (`model_type`, `architectures`) tells of, if dkv does not load it."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    return next((family for pattern, family in OTHERS if any(re.search(pattern, name) for name in plain)), None)
