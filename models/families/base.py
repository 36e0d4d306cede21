"""What an adapter is: how to recognise a configuration, read it, write it, and name its tensors."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dkv.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """An adapter: how to recognise a configuration, read it, write it, and name its tensors."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    spec: Callable[[Mapping], ModelSpec]
    config: Callable[[ModelSpec], dict]
    names: Mapping[str, str]
    # The configuration fields that say how many rows the two tables have, and whether they are one.
    rows_field: str
    tied_field: str

    def checkpoint_names(self, parameters: Iterable[str]) -> dict[str, str]:
        """Checkpoint name of every parameter name of `Transformer`, in the same order.

        Raises:
            ValueError: the family has no such parameter.
        """
        patterns = {ours: theirs for theirs, ours in self.names.items()}
        found = {}
        for name in parameters:
            module, _, leaf = name.rpartition(".")
            pattern = patterns.get(re.sub(r"\.\d+\.", ".{}.", module))
            if pattern is None:
                raise ValueError(f"the {self.name} format has no place for {name}")
            layer = re.search(r"\d+", module)
            found[name] = f"{pattern.format(layer and layer[0])}.{leaf}"
        return found

    def weight_name(self, module: str) -> str:
        """Checkpoint name of the weight of a module of `Transformer`."""
        return next(iter(self.checkpoint_names([f"{module}.weight"]).values()))
