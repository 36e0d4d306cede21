"""What an adapter of a model family is: tables, and one way to read, write and name by them."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dkv.models.families import fields
from dkv.models.spec import ModelSpec

# How a field is read, by the type of the attribute that it becomes.
READERS = {int: fields.count, float: fields.positive, bool: fields.flag}


@dataclass(frozen=True)
class Family:
    """An adapter: how to recognise a configuration, read it, write it, and name its tensors.

    Attributes:
        name: of the family, in `ModelSpec.family`.
        model_types, architectures: what its configurations call themselves; the first architecture is written.
        fields: field of the configuration -> attribute of `ModelSpec`. Of two for the same, the later counts.
        defaults: from a configuration to the attributes that it may leave out, as in the published configuration class,
            or cannot say; raises ValueError as `spec`.
        switches: fields with one implemented setting each; an absent one counts as set so.
        written: fields that are written besides, and their values.
        copies: fields that are written besides -> the attribute whose value they get.
        usual_ids: size of a published vocabulary -> ids that some of its files leave out. Elsewhere these would be any
            tokens.
        names: module of `Transformer` -> its name in checkpoints; {} is the number of the layer.
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
    names: Mapping[str, str]

    def spec(self, config: Mapping) -> ModelSpec:
        """The spec of a configuration; ValueError: a field is missing, malformed, or asks for what is not there."""
        values = self.defaults(config)
        fields.only(self.switches, config)
        for field, name in self.fields.items():
            values[name] = READERS[ModelSpec.__annotations__[name]](config, field, values.get(name))
        usual = self.usual_ids.get(fields.count(config, "vocab_size"), {})
        ids = fields.token_ids(config, usual, values["vocab_size"])
        return ModelSpec(self.name, rope_theta=fields.rope_theta(config, 10000.0), **values, **ids)

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """The configuration of a spec: every field that the published modeling code reads, but for the dtype."""
        ids = {name: getattr(spec, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
        if spec.eot_token_id is not None:
            ids["eot_token_id"] = spec.eot_token_id
        stated = {field: getattr(spec, name) for field, name in {**self.fields, **self.copies}.items()}
        fixed = {**self.switches, **self.written, "architectures": [self.architectures[0]], "use_cache": False}
        return {**fixed, **stated, **ids, "rope_theta": spec.rope_theta}

    def field_of(self, attribute: str) -> str:
        """The field of the configuration that counts for an attribute of `ModelSpec`."""
        return [field for field, name in self.fields.items() if name == attribute][-1]

    def checkpoint_names(self, parameters: Iterable[str]) -> dict[str, str]:
        """Checkpoint name of every parameter name of `Transformer`, in the same order; ValueError: it has none."""
        found = {}
        for name in parameters:
            module, _, leaf = name.rpartition(".")
            pattern = self.names.get(re.sub(r"\.\d+\.", ".{}.", module))
            if pattern is None:
                raise ValueError(f"the {self.name} format has no place for {name}")
            layer = re.search(r"\d+", module)
            found[name] = f"{pattern.format(layer and layer[0])}.{leaf}"
        return found

    def weight_name(self, module: str) -> str:
        """Checkpoint name of the weight of a module of `Transformer` outside its layers."""
        return f"{self.names[module]}.weight"
