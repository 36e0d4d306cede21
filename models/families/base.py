"""What an adapter of a model family is: tables, and one way to read, write and name by them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dkv.models.families import fields
from dkv.models.spec import ModelSpec

# How a field is read, by the type of the attribute that it becomes.
READERS = {
    int: fields.count,
    float: fields.positive,
    bool: fields.flag,
    int | None: fields.optional(fields.count),
    float | None: fields.optional(fields.positive),
}


@dataclass(frozen=True)
class Piece:
    """Where a tensor of a checkpoint goes, or so many of its rows: what `at` takes of a parameter, of this shape."""

    parameter: str
    at: tuple[int | slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """An adapter: how to recognise a configuration, read it, write it, and name its tensors.

    Attributes:
        name: of the family, in `ModelSpec.family`.
        model_types, architectures: what its configurations call themselves; the first architecture is written.
        fields: field of the configuration -> attribute of `ModelSpec`. Of two for the same, the later counts.
        defaults: from a configuration to the attributes that it may leave out, as in the published configuration class,
            or cannot say, or says in other ways than by a field of each; raises ValueError as `spec`.
        switches: fields with one implemented setting each; an absent one counts as set so.
        written: fields that are written besides, and their values.
        copies: fields that are written besides -> the attribute whose value they get.
        usual_ids: size of a published vocabulary -> ids that some of its files leave out. Elsewhere these would be any
            tokens.
        names: module of `Transformer` (or parameter) -> its name in checkpoints; {} is the number of the layer. Modules
            with one name in common have its rows, one after the other. Of a product of all experts: the names of those
            whose outputs stand side by side, a second {} being the number of the expert.
        more: from a spec to the fields that are written besides, where they are no copies.
        unmarked: its configurations say nothing of masks: they are taken for this family where the caller names it.
        unused: pattern of names of tensors that a file may hold besides, and that nothing is computed with.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    fields: Mapping[str, str]
    defaults: Callable[[Mapping], dict[str, Any]]
    switches: Mapping[str, Any]
    written: Mapping[str, Any]
    copies: Mapping[str, str]
    usual_ids: Mapping[int, dict[str, int]]
    names: Mapping[str, str | tuple[str, ...]]
    more: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    unmarked: bool = False
    # Older files hold the rotary frequencies, which follow from the configuration.
    unused: str = r"inv_freq$"

    def spec(self, config: Mapping) -> ModelSpec:
        """The spec of a configuration; ValueError: a field is missing, malformed, or asks for what is not there."""
        values = self.defaults(config)
        fields.only(self.switches, config)
        for field, name in self.fields.items():
            values[name] = READERS[ModelSpec.__annotations__[name]](config, field, values.get(name))
        usual = self.usual_ids.get(fields.count(config, "vocab_size"), {})
        ids = fields.token_ids(config, usual, values["vocab_size"])
        if "rope_theta" not in values:
            values["rope_theta"] = fields.rope_theta(config, 10000.0)
        return ModelSpec(self.name, **values, **ids)

    def told(self, config: Mapping, mask_token_id: int | None, attention_block: int | None) -> dict[str, Any]:
        """The configuration with what the caller knows better; ValueError: it is of the wrong kind, or has no place."""
        said = {"mask_token_id": mask_token_id, "attention_block": attention_block}
        for name, least in (("mask_token_id", 0), ("attention_block", 1)):
            if said[name] is not None and (type(said[name]) is not int or said[name] < least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {said[name]!r}")
        blocks = [field for field, name in self.fields.items() if name == "block_length"]
        if attention_block is not None and not blocks:
            raise ValueError(f"attention_block={attention_block} has no meaning: {self.name} has no blocks of its own")
        places = dict.fromkeys(blocks, attention_block) | {"mask_token_id": mask_token_id}
        return {**config, **{field: value for field, value in places.items() if value is not None}}

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """The configuration of a spec: every field that the published modeling code reads, but for the dtype."""
        ids = {name: getattr(spec, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
        if spec.eot_token_id is not None:
            ids["eot_token_id"] = spec.eot_token_id
        stated = {field: getattr(spec, name) for field, name in {**self.fields, **self.copies}.items()}
        fixed = {**self.switches, **self.written, "architectures": [self.architectures[0]], "use_cache": False}
        return {**fixed, **stated, **ids, "rope_theta": spec.rope_theta, **self.more(spec)}

    def field_of(self, attribute: str) -> str:
        """The field of the configuration that counts for an attribute of `ModelSpec`."""
        return [field for field, name in self.fields.items() if name == attribute][-1]

    @property
    def is_mixture(self) -> bool:
        """Whether its models have experts."""
        return any(isinstance(name, tuple) for name in self.names.values())

    def pieces(self, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        """Tensors of a checkpoint, and what they are to parameters of `Transformer`, given by name and shape.

        A tensor of several pieces consists of their rows. Raises ValueError: a parameter has no place.
        """
        found: dict[str, list[Piece]] = {}
        for name, shape in parameters.items():
            module, _, leaf = name.rpartition(".")
            whole, part = (re.sub(r"\.\d+\.", ".{}.", each) for each in (name, module))
            pattern = self.names.get(whole, self.names.get(part))
            if pattern is None:
                raise ValueError(f"the {self.name} format has no place for {name}")
            layer = re.search(r"\d+", module)
            number = layer and layer[0]
            if isinstance(pattern, str):
                theirs = pattern.format(number) + ("" if whole in self.names else f".{leaf}")
                found.setdefault(theirs, []).append(Piece(name, (), shape))
                continue
            rows = shape[1] // len(pattern)
            for expert in range(shape[0]):
                for i, one in enumerate(pattern):
                    at = (expert, slice(i * rows, (i + 1) * rows))
                    found[f"{one.format(number, expert)}.{leaf}"] = [Piece(name, at, (rows, shape[2]))]
        return found

    def weight_name(self, module: str) -> str:
        """Checkpoint name of the weight of a module of `Transformer` outside its layers."""
        return f"{self.names[module]}.weight"
