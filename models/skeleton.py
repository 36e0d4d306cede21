"""A network without storage that fits the tensors of a checkpoint, or a message that says what does not fit."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dkv.models.families import Family
from dkv.models.files import Entry, some
from dkv.models.foreign import refuse_additions
from dkv.models.spec import ModelSpec
from dkv.models.transformer import Transformer

REMEDY = "check that weights and config.json belong together"
LACKS = "lacks tensors that its configuration asks for"
# What is known of the tensors of a checkpoint, by their names there: entries of files, or those of a model in memory.
Tensors = Mapping[str, Entry] | Mapping[str, nn.Parameter]

log = logging.getLogger(__name__)


def skeleton(family: Family, config: dict, tensors: Tensors, origin: str) -> tuple[Transformer, dict[str, str]]:
    """A model without storage that fits the tensors, and the checkpoint names of its parameters.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not of the plain model; or the configuration
            asks for more than there is. `origin` says in the message where they come from.
    """
    refuse_additions(tensors, origin)
    config = _completed(family, config, tensors)
    spec = family.spec(config)
    _check_sizes(spec, config, tensors, origin)
    with torch.device("meta"):
        model = Transformer(spec)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = family.checkpoint_names(expected)
    if lost := [name for name in names.values() if name not in tensors]:
        raise ValueError(f"{origin} {LACKS}: {some(lost)}; found {some(tensors) or 'none'}: {REMEDY}")
    for ours, theirs in names.items():
        if tensors[theirs].shape != expected[ours]:
            raise ValueError(
                f"{theirs} in {_file(tensors[theirs], origin)} has shape {list(tensors[theirs].shape)}, but the "
                f"configuration asks for {list(expected[ours])}: {REMEDY}"
            )
    # Older files hold the rotary frequencies, which follow from the configuration.
    odd = sorted(name for name in tensors.keys() - names.values() if not name.endswith("inv_freq"))
    if odd:
        what = f"{spec.num_layers} layers and {'a tied' if spec.tied_head else 'its own'} head"
        raise ValueError(
            f"{_file(tensors[odd[0]], origin)} has unexpected tensors: {some(odd)}; the configuration describes "
            f"a {family.name} model with {what}: {REMEDY}"
        )
    return model, names


def fill(model: Transformer, names: Mapping[str, str], parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Put parameters, which come by their checkpoint names, in the place of those without storage."""
    ours = {theirs: name for name, theirs in names.items()}
    for theirs, parameter in parameters:
        if theirs in ours:
            module, _, leaf = ours[theirs].rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    if model.spec.tied_head:
        model.head.weight = model.embed.weight


def _completed(family: Family, config: Mapping, tensors: Tensors) -> dict:
    """The configuration, where the tensors fill in what it leaves open."""
    head, table = (family.weight_name(module) for module in ("head", "embed"))
    tied_field, rows_field = family.field_of("tied_head"), family.field_of("vocab_size")
    config = {tied_field: head not in tensors} | {k: v for k, v in config.items() if v is not None}
    stated = config.get(rows_field, config.get("vocab_size"))
    rows = {tensors[name].shape[0] for name in (head, table) if name in tensors and len(tensors[name].shape) == 2}
    if len(rows) == 1 and type(stated) is int and max(rows) > stated > 0:
        # Tables are often padded beyond the vocabulary.
        log.info("the tables have %d rows, and the configuration says %d: using all", max(rows), stated)
        config[rows_field] = max(rows)
    return config


def _check_sizes(spec: ModelSpec, config: Mapping, tensors: Tensors, origin: str) -> None:
    """Refuse more layers or longer rows than the tensors can have, before a network of that size is built."""
    if spec.num_layers > len(tensors):
        raise ValueError(f"{origin} {LACKS}: {len(tensors)} tensors are not {spec.num_layers} layers: {REMEDY}")
    longest = max((max(t.shape) for t in tensors.values() if t.shape and 0 not in t.shape), default=0)
    sizes = {name: getattr(spec, name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    sizes |= {f"{name} x head_dim": getattr(spec, name) * spec.head_dim for name in ("num_heads", "num_kv_heads")}
    for name, size in sizes.items():
        if size > longest:
            # Families write the same size under different names.
            said = ", ".join(field for field, value in config.items() if value == size) or name
            raise ValueError(
                f"the configuration has {said}={size}, but no tensor of {origin} is longer than {longest}: {REMEDY}"
            )


def _file(tensor: Entry | nn.Parameter, origin: str) -> str:
    return str(getattr(tensor, "file", origin))
