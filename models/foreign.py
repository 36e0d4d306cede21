"""What other libraries add to a model: recognised by names, so that nothing of it is left out in silence."""

import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MERGE = "merge it into the weights first (peft: `model = model.merge_and_unload()`)"
_PROMPT = "a learned prompt cannot be merged into weights, and dkv has no place for it: use the model without it"
_PARAMETRIZED = "make it permanent first (torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'))"
_NORM = "make it permanent first (torch.nn.utils.remove_weight_norm)"
_PRUNED = "make it permanent first (prune.remove)"
_SPLIT = "gather the whole state dict, and load that"
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
    r"weight_(orig|mask)$": ("pruning or a spectral norm of torch", _PRUNED),
    r"weight_[gv]$": ("a weight norm of torch", _NORM),
    r"(^|[._])(flat_param|fsdp_wrapped_module)": ("a model that FSDP has split", _SPLIT),
    rf"(^|[._])({_CODES}|weight_(packed|scale|scale_inv|zero_point|format))(\.|$)": ("quantised weights", _QUANTISED),
}
# `peft_type` of adapters that are no change of the weights.
PROMPTS = "(MULTITASK_)?PROMPT_TUNING|PREFIX_TUNING|P_TUNING|ADAPTION_PROMPT|CPT|CARTRIDGE"

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The only child of a module that stands in front of a model: torch.compile's, and that of DataParallel and its kin.
FRONTS = ("_orig_mod", "module")
# What compiling or checkpointing one module puts into the names of its parameters.
BETWEEN = r"_orig_mod\.|_checkpoint_wrapped_module\."


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


def behind_fronts(model: nn.Module) -> nn.Module:
    """The model itself, where it is the only child of a module that hands everything on to it."""
    while len(children := dict(model.named_children())) == 1 and (front := next(iter(children))) in FRONTS:
        model = children[front]
    return model


def plain_parameters(model: nn.Module, origin: str) -> dict[str, nn.Parameter]:
    """The parameters by name; ValueError: there are additions to them, or weights that plain layers cannot hold."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(), model.named_modules())
    refuse_additions((name for kind in named for name, _ in kind), origin)
    parameters = {re.sub(BETWEEN, "", name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, p in parameters.items():
        if p.device.type == "meta":
            raise ValueError(f"{name} is on the meta device, without storage: load the weights first")
        if p.dtype not in DTYPES or type(p.data) is not Tensor or type(p) is not nn.Parameter:
            what = type(p.data if type(p) is nn.Parameter else p).__name__
            raise ValueError(
                f"{name} is a {what} of {p.dtype}, and only plain tensors of {', '.join(map(str, DTYPES))} can be "
                "shared: wrap the model first, then quantise or distribute the result"
            )
        if hasattr(p, "ds_id") and p.numel() == 0:
            raise ValueError(f"{name} is split over processes by DeepSpeed ZeRO: gather the weights, and load those")
    for what, advice in {"dtype": "cast the model", "device": "move the model to one"}.items():
        counts = Counter(getattr(p, what) for p in parameters.values())
        if len(counts) > 1:
            parts = ", ".join(f"{number} of {one}" for one, number in counts.items())
            raise ValueError(f"parameters of several {what}s cannot be shared ({parts}): {advice} with .to({what})")
    return parameters
