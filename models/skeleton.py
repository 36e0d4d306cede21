"""A network without storage that fits the tensors of a checkpoint, or a message that says what does not fit."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dkv.models.families import Family
from dkv.models.files import some
from dkv.models.foreign import refuse_additions
from dkv.models.spec import ModelSpec
from dkv.models.transformer import Transformer

REMEDY = "check that weights and config.json belong together"

log = logging.getLogger(__name__)


def skeleton(
    family: Family, config: dict, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, str], origin: str
) -> tuple[Transformer, dict[str, str]]:
    """A model without storage that fits the tensors, and the checkpoint names of its parameters.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape (`places` says in which file of `origin` it
            is), or not of the plain model; or the configuration asks for more than there is.
    """
    refuse_additions(shapes, origin)
    config = _completed(family, config, shapes)
    spec = family.spec(config)
    _check_sizes(spec, config, shapes, origin)
    with torch.device("meta"):
        model = Transformer(spec)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = family.checkpoint_names(expected)
    if lost := [name for name in names.values() if name not in shapes]:
        names = f"{some(lost)}; found {some(shapes) or 'none'}"
        raise ValueError(f"{origin} lacks tensors that its configuration asks for: {names}: {REMEDY}")
    for ours, theirs in names.items():
        if shapes[theirs] != expected[ours]:
            raise ValueError(
                f"{theirs} in {places.get(theirs, origin)} has shape {list(shapes[theirs])}, but the configuration "
                f"asks for {list(expected[ours])}: {REMEDY}"
            )
    # Older files hold the rotary frequencies, which follow from the configuration.
    odd = sorted(name for name in shapes.keys() - names.values() if not name.endswith("inv_freq"))
    if odd:
        what = f"{model.spec.num_layers} layers and {'a tied' if model.spec.tied_head else 'its own'} head"
        raise ValueError(
            f"{places.get(odd[0], origin)} has unexpected tensors: {some(odd)}; the configuration describes "
            f"a {family.name} model with {what}: {REMEDY}"
        )
    return model, names


def _completed(family: Family, config: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The configuration, where the tensors fill in what it leaves open."""
    head, table = (family.weight_name(module) for module in ("head", "embed"))
    config = {family.tied_field: head not in shapes} | {k: v for k, v in config.items() if v is not None}
    stated = config.get(family.rows_field, config.get("vocab_size"))
    rows = {shapes[name][0] for name in (head, table) if len(shapes.get(name, ())) == 2}
    if len(rows) == 1 and type(stated) is int and max(rows) > stated > 0:
        # Tables are often padded beyond the vocabulary.
        log.info("the tables have %d rows, and the configuration says %d: using all", max(rows), stated)
        config[family.rows_field] = max(rows)
    return config


def _check_sizes(spec: ModelSpec, config: Mapping, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Refuse more layers or longer rows than the tensors can have, before a network of that size is built."""
    if spec.num_layers > len(shapes):
        counts = f"{len(shapes)} tensors are not {spec.num_layers} layers"
        raise ValueError(f"{origin} lacks tensors that its configuration asks for: {counts}: {REMEDY}")
    longest = max((max(shape) for shape in shapes.values() if shape and 0 not in shape), default=0)
    sizes = {name: getattr(spec, name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    sizes |= {f"{name} x head_dim": getattr(spec, name) * spec.head_dim for name in ("num_heads", "num_kv_heads")}
    for name, size in sizes.items():
        if size > longest:
            # Families write the same size under different names.
            said = ", ".join(field for field, value in config.items() if value == size) or name
            raise ValueError(
                f"the configuration has {said}={size}, but no tensor of {origin} is longer than {longest}: {REMEDY}"
            )


def fill(model: Transformer, names: Mapping[str, str], parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Put parameters, which come by their checkpoint names, in the place of those without storage."""
    ours = {theirs: name for name, theirs in names.items()}
    for theirs, parameter in parameters:
        if theirs in ours:
            module, _, leaf = ours[theirs].rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    if model.spec.tied_head:
        model.head.weight = model.embed.weight
