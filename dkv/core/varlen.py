"""The entries of a pass: those of all rows one after the other, filled up at the end."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """What the number of entries in a pass is filled up to: few sizes, as each is compiled or captured on its own.

    Attributes:
        multiple: of which the number is a multiple.
        sizes: the first of them, ascending, in place of the first multiples.
    """

    multiple: int
    sizes: tuple[int, ...] = ()

    def filled(self, count: int, most: int) -> int:
        """At least `count` and, where that is less, no more than `most`."""
        size = next((size for size in (0, *self.sizes) if count <= size), -(-count // self.multiple) * self.multiple)
        return min(size, max(most, count))


# By the kind of device, where steps are taken as they come. oneDNN compiles a product anew for a shape that it has not
# met, and every step would have another one.
PADDINGS = {"cpu": Padding(4)}
# On a GPU launches are made ready, and graphs captured, for each shape. Few entries cost about what one costs.
GRAPHED = PADDINGS["cuda"] = Padding(64, (16, 32, 64, 96, 128, 192, 256))


@dataclass(frozen=True)
class Segments:
    """Where the entries of each row stand in a packed tensor [T, ...].

    Attributes:
        starts, lengths: int64 [B] on the device: the first entry of a row, and how many it has.
        most: no row has more.
    """

    starts: Tensor
    lengths: Tensor
    most: int

    @classmethod
    def equal(cls, batch: int, length: int, device: torch.device) -> "Segments":
        """Rows of one length, without filling."""
        starts = torch.arange(batch, device=device) * length
        return cls(starts, torch.full_like(starts, length), length)

    def twice(self, total: int) -> "Segments":
        """All rows, and all of them once more behind the first `total` entries."""
        return Segments(torch.cat((self.starts, self.starts + total)), self.lengths.repeat(2), self.most)


@dataclass(frozen=True)
class Layout:
    """Whose the entries of a pass are, T of them.

    Attributes:
        positions: int64 [T], their slots, which are also their rotary positions.
        rows: int64 [T], the row of the buffer of each.
        segments: where the entries of each row stand.
        outputs: int64 [R], which of the T need an output; None: all.
        output_segments: where those of each row stand in [R].
        ends: int64 [T], each sees the slots of its row before this one; None: all.
    """

    positions: Tensor
    rows: Tensor
    segments: Segments
    outputs: Tensor | None = None
    output_segments: Segments | None = None
    ends: Tensor | None = None


class Narrow(Protocol):
    """What lets fewer entries go on after some layers of a pass.

    Attributes:
        layers: numbers of these layers.
    """

    layers: Collection[int]

    def __call__(self, layer: int, x: Tensor, delta: Tensor | None, layout: Layout) -> tuple[Tensor, Layout]:
        """From what a layer gives, x + delta [T, d], the entries that go on, [T', d], and their layout."""
