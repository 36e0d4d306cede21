"""Which models of transformers can be served, and which of them say by a flag that their attention is causal.

Both are read from the classes of a model: not from a list of names, and not from what else happens to be loaded.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.models.auto.auto_factory import _BaseAutoModelClass

NAME = "dkv"
ELSEWHERE = 'load the model with attn_implementation="eager"'
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
KNOWS_ENCODERS = "is_causal" in inspect.unwrap(masking_utils.create_causal_mask).__code__.co_consts


def watch_models() -> None:
    """Have models that cannot be served raise when they are built or told to change; twice does no harm.

    transformers does not ask an attention whether it suits a model, and some models take any name and never call it.
    So the two methods of `PreTrainedModel` that every name passes through are wrapped.
    """
    if hasattr(PreTrainedModel.set_attn_implementation, "watched"):
        return
    choose, change = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation

    @wraps(choose)
    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention == NAME:
            refuse(type(self), _is_part(self))
        return choose(self, requested_attention, *args, **kwargs)

    @wraps(change)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        # Where transformers leaves a model as it is, it only says so in its log.
        if attn_implementation == NAME:
            for part in self.modules():
                if isinstance(part, PreTrainedModel):
                    refuse(type(part), part is not self)
        elif isinstance(attn_implementation, dict) and attn_implementation.get("") == NAME:
            refuse(type(self))
        return change(self, attn_implementation, *args, **kwargs)

    set_attn_implementation.watched = True
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _is_part(model: PreTrainedModel) -> bool:
    """Another model is building, or changing, this one."""
    frame = sys._getframe(1)
    while frame := frame.f_back:
        if frame.f_code.co_name in ("__init__", "set_attn_implementation"):
            caller = frame.f_locals.get("self")
            if isinstance(caller, PreTrainedModel) and caller is not model:
                return True
    return False


def refuse(model: type[PreTrainedModel], part: bool = False) -> None:
    """Raise ValueError, with the reason, if a class of models cannot be served: alone, or as a part of another."""
    reason = _reason(model, part)
    if reason:
        raise ValueError(
            f"attn_implementation 'dkv' cannot serve {model.__name__}, which {reason}: {ELSEWHERE}; if it is a part of "
            'another model, name each part: attn_implementation={"": "dkv", "vision_config": "eager"}'
        )


@cache
def _reason(model: type[PreTrainedModel], part_of_another: bool) -> str | None:
    """Why a class of models cannot be served. Its parts that are models answer for themselves when they are built."""
    built, whole = _built(model), _built(model, parts=True)
    served = any(_is_chosen(x) or _asks_the_interface(x) for x in (model, *whole.values()))
    for name, thing in (built if served else whole).items():
        if isinstance(thing, dict) and "eager" in thing and NAME not in thing:
            return f"picks its attention from a table of its own, {name}, of {', '.join(sorted(thing))}"
    # A part that is a convolutional backbone, or works with any name as transformers says, is no obstacle to the rest.
    if served or (part_of_another and (model._supports_sdpa or "BackboneMixin" in [x.__name__ for x in model.__mro__])):
        return None
    own = sorted(name for name in whole if "Attention" in name)
    return f"does not go through transformers' AttentionInterface (it has {', '.join(own) or 'no attention'})"


def _built(model: type[nn.Module], parts: bool = False) -> dict[str, Any]:
    """What the constructor of a model names: classes of modules, and what theirs name; tables of classes; other
    models, which are looked into if `parts`."""
    found, todo = {}, [model]
    while todo:
        for function in _constructors(todo.pop()):
            for name in _names(function.__code__) - found.keys():
                thing = function.__globals__.get(name)
                kinds = _kinds(thing)
                if kinds or _is_chosen(thing):
                    within = [x for x in kinds if parts or not issubclass(x, PreTrainedModel)]
                    todo += [x for x in within if x.__name__ not in found]
                    found |= {x.__name__: x for x in kinds} | {name: thing}
    return found


def _kinds(thing: Any) -> list[type[nn.Module]]:
    """The classes of modules in a global: itself, or the entries of a table."""
    entries = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else [thing]
    return [x for x in entries if isinstance(x, type) and issubclass(x, nn.Module)]


def _is_chosen(thing: Any) -> bool:
    """One of the ways to make a model whose class its configuration names."""
    return getattr(thing, "__name__", "") == "load_backbone" or (
        isinstance(thing, type) and issubclass(thing, _BaseAutoModelClass)
    )


def _asks_the_interface(thing: Any) -> bool:
    """The class looks up its attention by name where transformers keeps the registered ones."""
    return isinstance(thing, type) and any(INTERFACE in _names(x.__code__) for x in _methods(thing))


def _methods(kind: type) -> Iterator[FunctionType]:
    """The functions of a class and of those it derives from, outside of PyTorch."""
    for base in kind.__mro__:
        if base is not PreTrainedModel and base.__module__.partition(".")[0] not in ("torch", "builtins"):
            yield from (inspect.unwrap(x) for x in vars(base).values() if inspect.isfunction(x))


def _constructors(kind: type) -> list[FunctionType]:
    """The constructors of a class, as far as they call each other, and its functions that they call."""
    found, names, methods = [], {"__init__"}, list(_methods(kind))
    while called := [x for x in methods if x.__name__ in names and x.__name__ != "forward" and x not in found]:
        first = called[0]
        found.append(first)
        own = _names(first.__code__)
        names |= own
        if first.__name__ == "__init__" and "super" not in own:
            methods = [x for x in methods if x.__name__ != "__init__"]
    return found


def _names(code: CodeType) -> set[str]:
    """The global names and attributes in a function and in those inside it."""
    return set(code.co_names).union(*(_names(x) for x in code.co_consts if isinstance(x, CodeType)))


def made_an_encoder(config: PretrainedConfig) -> bool:
    """Its masks are asked for without causality, whatever the flags say: transformers 5 goes by the configuration."""
    return KNOWS_ENCODERS and getattr(config, "is_causal", None) is False


@torch.compiler.assume_constant_result
def kind_of_masks(config: type[PretrainedConfig]) -> tuple[bool, bool]:
    """What a mask may look like for the models of a configuration.

    Returns:
        bool: they take bool masks, which eager attention never makes: transformers runs them with sdpa too.
        flags: they understand None for a causal mask: every attention that may have this configuration goes through
            the interface and sets `is_causal = True`, always.

    Raises:
        ValueError: none of its models can be served.
    """
    return _kind_of_masks(config)


@cache
def _kind_of_masks(config: type[PretrainedConfig]) -> tuple[bool, bool]:
    # Those that transformers makes may have been written for another configuration, in a module of its own.
    made = _models(config)
    names = {x.__name__ for x in (*config.__mro__, *(model.config_class for model in made))}
    modules = [*_modules(config), *(sys.modules[model.__module__] for model in made)]
    classes = {m.__name__: [x for x in vars(m).values() if isinstance(x, type)] for m in modules}
    attentions = {x for found in classes.values() for x in found if _asks_the_interface(x)}
    homes = [name for name, found in classes.items() if attentions.intersection(found)] or list(classes)
    models = [x for name in homes for x in classes[name] if issubclass(x, PreTrainedModel) and x.__module__ == name]
    own = [x for x in models if getattr(x, "config_class", None) in config.__mro__]
    if own and all(_reason(x, True) for x in own):
        refuse(own[-1], part=True)
    takes_bool = bool(models) and all(x._supports_sdpa for x in models)
    attentions = [x for x in attentions if _takes(x, names)]
    return takes_bool, takes_bool and bool(attentions) and all(map(_always_causal, attentions))


def _models(config: type[PretrainedConfig]) -> list[type[PreTrainedModel]]:
    """The models that transformers itself makes of a configuration."""
    found = []
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        with suppress(ValueError):  # an entry that names no model
            found.append(mapping.get(config, None))
    return [x for x in found if isinstance(x, type) and issubclass(x, PreTrainedModel)]


def _modules(config: type[PretrainedConfig]) -> list[ModuleType]:
    """The modules that may hold the models of a configuration: its own, and the `modeling_*` beside it that name it."""
    found = {}
    for kind in config.__mro__:
        own = sys.modules.get(kind.__module__)
        if not issubclass(kind, PretrainedConfig) or kind is PretrainedConfig or own is None:
            continue
        found[own.__name__] = own
        package, file = kind.__module__.rpartition(".")[0], getattr(own, "__file__", None)
        for path in sorted(Path(file).parent.glob("modeling_*.py")) if package and file else ():
            if re.search(rf"\b{kind.__name__}\b", path.read_text(encoding="utf-8")):
                with suppress(ImportError):  # of another framework, or of a package that is not there: not in use
                    module = importlib.import_module(f"{package}.{path.stem}")
                    found[module.__name__] = module
    return list(found.values())


def _takes(attention: type[nn.Module], configs: set[str]) -> bool:
    """A module of this class may have one of these configurations, as far as its constructor says."""
    given = inspect.signature(attention.__init__).parameters.get("config")
    if given is None or given.annotation is inspect.Parameter.empty:
        return True
    return not configs.isdisjoint(re.findall(r"\w+", str(given.annotation)))


def _always_causal(attention: type[nn.Module]) -> bool:
    """The constructor sets `is_causal` to True, and to nothing else."""
    bases = [x for x in attention.__mro__ if x.__module__.partition(".")[0] not in ("torch", "builtins")]
    try:
        source = "".join(map(inspect.getsource, bases))
    except (OSError, TypeError):
        return False
    return set(re.findall(r"\bis_causal\s*=\s*(\w.*?)\s*(?:#.*)?$", source, re.MULTILINE)) == {"True"}
