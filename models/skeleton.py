"""A network without storage that fits the tensors of a checkpoint, or a message that says what does not fit."""

import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dkv.models.families import Family
from dkv.models.families.base import Piece
from dkv.models.files import Entry, some
from dkv.models.foreign import refuse_additions
from dkv.models.gemma import Gemma
from dkv.models.gemma_spec import GemmaSpec
from dkv.models.spec import ModelSpec
from dkv.models.transformer import Transformer

REMEDY = "check that weights and config.json belong together"
LACKS = "lacks tensors that its configuration asks for"
# By the tensors of a checkpoint, what they are to the parameters of a model.
Pieces = Mapping[str, list[Piece]]
# What is known of the tensors of a checkpoint, by their names there: entries of files, or those of a model in memory.
Tensors = Mapping[str, Entry] | Mapping[str, nn.Parameter]

# By the kind of its spec, the network of a model.
NETWORKS = {ModelSpec: Transformer, GemmaSpec: Gemma}

log = logging.getLogger(__name__)


def skeleton(family: Family, config: dict, tensors: Tensors, origin: str) -> tuple[Transformer, Pieces]:
    """A model without storage that fits the tensors, and which tensor is what of it.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not of the plain model; or the configuration
            asks for more than there is. `origin` says in the message where they come from.
    """
    refuse_additions(tensors, origin)
    config = _completed(family, config, tensors)
    spec = family.spec(config)
    _check_sizes(spec, config, tensors, origin)
    with torch.device("meta"):
        model = NETWORKS[type(spec)](spec)
    pieces = family.pieces({name: tuple(p.shape) for name, p in model.named_parameters()})
    if lost := [name for name in pieces if name not in tensors]:
        raise ValueError(f"{origin} {LACKS}: {some(lost)}; found {some(tensors) or 'none'}: {REMEDY}")
    for theirs, parts in pieces.items():
        wanted = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if tensors[theirs].shape != wanted:
            raise ValueError(
                f"{theirs} in {_file(tensors[theirs], origin)} has shape {list(tensors[theirs].shape)}, but the "
                f"configuration asks for {list(wanted)}: {REMEDY}"
            )
    odd = sorted(name for name in tensors.keys() - pieces.keys() if not re.search(family.unused, name))
    if odd:
        what = f"{spec.num_layers} layers and {'a tied' if spec.tied_head else 'its own'} head"
        raise ValueError(
            f"{_file(tensors[odd[0]], origin)} has unexpected tensors: {some(odd)}; the configuration describes "
            f"a {family.name} model with {what}: {REMEDY}"
        )
    return model, pieces


def fill(model: Transformer, pieces: Pieces, tensors: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Put tensors, which come by their checkpoint names, in the place of the parameters without storage.

    One that is a parameter by itself becomes it; a parameter of several is made when the first of them comes.
    """
    for theirs, tensor in tensors:
        if theirs not in pieces:
            continue
        parts = pieces[theirs]
        for part, rows in zip(parts, tensor.detach().split([part.shape[0] for part in parts]), strict=True):
            module, _, leaf = part.parameter.rpartition(".")
            owner = model.get_submodule(module)
            if len(parts) == 1 and not part.at:
                setattr(owner, leaf, tensor)
                continue
            if getattr(owner, leaf).is_meta:
                room = torch.empty(getattr(owner, leaf).shape, dtype=tensor.dtype, device=tensor.device)
                setattr(owner, leaf, nn.Parameter(room, requires_grad=False))
            getattr(owner, leaf)[part.at].copy_(rows)
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
    if spec.mixture is not None and spec.mixture.experts > len(tensors):
        raise ValueError(f"{origin} {LACKS}: {len(tensors)} tensors are not {spec.mixture.experts} experts: {REMEDY}")
    longest = max((max(t.shape) for t in tensors.values() if t.shape and 0 not in t.shape), default=0)
    sizes = {name: getattr(spec, name) for name in ("hidden_size", "vocab_size")}
    sizes |= {"intermediate_size": spec.intermediate_size} if spec.has_dense_layers else {}
    sizes |= {} if spec.mixture is None else {"width of an expert": spec.mixture.width}
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
