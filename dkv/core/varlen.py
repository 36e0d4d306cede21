"""The entries of a pass: those of all rows one after the other, filled up at the end."""

from dataclasses import dataclass

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
