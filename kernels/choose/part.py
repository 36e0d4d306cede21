"""The choice from a vocabulary that several processes share: each has the logits of some ids, and all choose alike."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Part(Protocol):
    """A layer that gives logits strip by strip, of the ids that this process has.

    Attributes:
        first: its first id; the parts stand in the order of the processes.
        in_features, out_features: of the whole layer; called, it gives the logits of all ids [R, V].
    """

    first: int
    in_features: int
    out_features: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of all ids, [R, V]."""

    def strips(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of the own ids, [R, C] each, in their order."""

    def gathered(self, x: Tensor) -> Tensor:
        """What all processes have of x [R, n], in their order, [processes, R, n]: the same bits in all of them."""


def part_of(head: object) -> Part | None:
    """The layer, if it has a part of the vocabulary alone."""
    return head if getattr(head, "gathered", None) else None


def exchanged(whole: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    """Of what every part has, [R, n], that of all parts in the order of their ids, [R, parts * n].

    One exchange, of a few numbers a row; float64 holds ids, and numbers of all dtypes, exactly.
    """
    sizes = [x.shape[1] for x in whole.values()]
    found = part.gathered(torch.cat([x.double() for x in whole.values()], 1)).movedim(0, 1)
    columns = zip(whole.items(), found.split(sizes, 2), strict=True)
    return {name: column.flatten(1).to(x.dtype) for (name, x), column in columns}
