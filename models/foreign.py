"""What other libraries add to a model: recognised by names, so that nothing of it is left out in silence."""

import re
from collections.abc import Iterable

_MERGE = "merge it into the weights first (peft: `model = model.merge_and_unload()`)"
_PROMPT = "a learned prompt cannot be merged into weights, and dkv has no place for it: use the model without it"
_PARAMETRIZED = "make it permanent first (torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'))"
_NORM = "make it permanent first (torch.nn.utils.remove_weight_norm)"
_QUANTISED = "take the original weights, load or wrap them, and quantise the result (after dkv.unpack, if packed)"

# What begins the names of peft's other adapters, what their prompts are called, and the parts of quantised layers.
_PEFT = "hada|lokr|oft|boft|vera|hra|fourierft|bone|miss|shira|road|c3a|randlora|waveft|delora|gralora"
_PROMPTS = r"prompt_encoder|prompt_embeddings?|prefix_encoder|adaption_\w+|soft_prompt"
_CODES = "qweight|qzeros|g_idx|scb|absmax|quant_map|quant_state|nested_absmax|packed_params"

# A pattern of a parameter's, buffer's or module's name -> what it is, and what to do. The first that fits counts.
ADDITIONS = {
    r"(^|[._])lora_magnitude": ("a DoRA adapter", _MERGE),
    r"(^|[._])lora_": ("a LoRA adapter", _MERGE),
    r"(^|[._])ia3_": ("an IA3 adapter", _MERGE),
    rf"(^|[._])({_PEFT})_": ("an adapter of peft", _MERGE),
    rf"(^|\.)({_PROMPTS})(\.|$)": ("a prompt", _PROMPT),
    r"(^|\.)(base_layer|modules_to_save|trainable_tokens\w*|adapters?(_\w+)?)(\.|$)": ("an adapter", _MERGE),
    r"(^|\.)parametrizations(\.|$)": ("a parametrisation of torch", _PARAMETRIZED),
    r"weight_(orig|mask)$": ("pruning or a spectral norm of torch", "make it permanent first (prune.remove)"),
    r"weight_[gv]$": ("a weight norm of torch", _NORM),
    r"(^|[._])(flat_param|fsdp_wrapped_module)": (
        "a model that FSDP has split",
        "gather the whole state dict, and load that",
    ),
    rf"(^|[._])({_CODES}|weight_(packed|scale|scale_inv|zero_point|format))(\.|$)": ("quantised weights", _QUANTISED),
}

# `peft_type` of adapters that are no change of the weights.
PROMPTS = "(MULTITASK_)?PROMPT_TUNING|PREFIX_TUNING|P_TUNING|ADAPTION_PROMPT|CPT|CARTRIDGE"


def refuse_additions(names: Iterable[str], origin: str) -> None:
    """Raise ValueError if one of the names tells of something on top of the plain weights."""
    names = list(names)
    for pattern, (what, advice) in ADDITIONS.items():
        if name := next((name for name in names if re.search(pattern, name, re.IGNORECASE)), None):
            raise ValueError(f"{origin} has {what} ({name}), which would be left out: {advice}")


def adapter_advice(kind: str) -> str:
    """What to do with a folder that holds an adapter of this `peft_type`."""
    if re.fullmatch(PROMPTS, kind):
        return _PROMPT
    return (
        "merge it into its base model with peft (`PeftModel.from_pretrained(base, folder).merge_and_unload()`, then "
        "`save_pretrained`), and load that folder"
    )
