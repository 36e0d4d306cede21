"""Models that are in memory already: recognised, checked, and shared."""

import re
from collections import Counter

import torch
from torch import Tensor, nn

from dkv.models.families import family_of
from dkv.models.foreign import refuse_additions
from dkv.models.skeleton import fill, skeleton
from dkv.models.transformer import Transformer

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The only child of a module that stands in front of a model: torch.compile's, and that of DataParallel and its kin.
FRONTS = ("_orig_mod", "module")
# What compiling or checkpointing one module puts into the names of its parameters.
BETWEEN = r"_orig_mod\.|_checkpoint_wrapped_module\."


def wrap(hf_model: nn.Module) -> Transformer:
    """Share the parameters of a LLaDA or Dream model that is already in memory.

    The result holds the very parameter objects of `hf_model`: training, moving or casting either
    model changes both. Nothing else is taken over: hooks of the original are not seen, and what
    computes beside the weights (LoRA and other adapters, parametrisations, quantised layers) is refused.

    Args:
        hf_model: a module with a `config` and the parameter names of its family, with or without
            their first component ("model."); also behind torch.compile or DistributedDataParallel.

    Returns:
        The model in eval mode, its parameters as frozen or trainable as they were. It does not know a
        tokenizer: give `dkv.generate` a `vocab_limit` if the tables are wider than that.

    Raises:
        TypeError: it is no module.
        ValueError: an unknown family; adapters or other additions; parameters without storage, quantised, of several
            dtypes or on several devices; or names and shapes that do not fit the configuration.
    """
    if not isinstance(hf_model, nn.Module):
        raise TypeError(f"hf_model must be a model in memory, got {type(hf_model).__name__}: dkv.load takes a path")
    original = _behind_fronts(hf_model)
    kind, origin = type(original).__name__, f"the {type(original).__name__} in memory"
    if isinstance(original, Transformer):
        raise ValueError("this model is dkv's already: use it as it is")
    parameters = _plain_parameters(original, origin)
    found = getattr(original, "config", None)
    if found is None:
        raise ValueError(f"{kind} has no config to tell its family: pass a LLaDA or Dream model")
    config = dict(found.to_dict() if hasattr(found, "to_dict") else getattr(found, "__dict__", found))
    family = family_of(config)
    roots = {pattern.partition(".")[0] for pattern in family.names}
    if not any(name.startswith("model.") for name in parameters):
        parameters = {n if n.partition(".")[0] in roots else f"model.{n}": p for n, p in parameters.items()}
    head, table = (family.weight_name(module) for module in ("head", "embed"))
    if head in parameters and parameters[head] is parameters.get(table):
        config[family.tied_field] = True
        del parameters[head]
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    model, names = skeleton(family, config, shapes, {}, origin)
    fill(model, names, parameters.items())
    return model.eval()


def _behind_fronts(model: nn.Module) -> nn.Module:
    """The model itself, where it is the only child of a module that hands everything on to it."""
    while len(children := dict(model.named_children())) == 1 and (front := next(iter(children))) in FRONTS:
        model = children[front]
    return model


def _plain_parameters(model: nn.Module, origin: str) -> dict[str, nn.Parameter]:
    """The parameters by name, if they are all that the model computes with, and plain linear layers can.

    Raises:
        ValueError: additions to the weights, or weights of another kind; the message names one.
    """
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
