"""Rows of different lengths, side by side for attention and one after the other for everything else."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """What the entries of the rows in a pass are filled up to.

    Attributes:
        multiple: of which the number of entries is a multiple; few sizes, as each is compiled or captured on its own.
        sizes: the first of them, ascending, in place of the first multiples.
        alike: all rows are filled up to one size, and the shape of a pass follows from that alone: nothing is
            uploaded for it. Otherwise each row has its own, so that a short one costs what it costs alone.
    """

    multiple: int
    sizes: tuple[int, ...] = ()
    alike: bool = False

    def filled(self, counts: Sequence[int], most: int) -> tuple[int, ...]:
        """The entries of each row, where all are alike at most `most`; none where no row has one."""
        if not self.alike:
            return tuple(map(self._size, counts))
        longest = max(counts)
        return (min(self._size(longest), max(most, longest)) if longest else 0,) * len(counts)

    def _size(self, count: int) -> int:
        return next((size for size in (0, *self.sizes) if count <= size), -(-count // self.multiple) * self.multiple)


class Varlen:
    """The layout of B rows with `counts` entries each: [B, N, ...] filled up to the longest, or [T, ...] packed.

    Products, norms and the choice of tokens see [T, ...], so that a short row costs what it costs alone.
    Where all rows are of one length, both forms are views of one another.

    Args:
        counts: entries of each row, known to the host.
        device: where the entries live.
        lengths: int64 [B] on the device, how many of these count; None: all.

    Attributes:
        width, total: N and T.
        lengths: int64 [B] on the device; None where all entries of all rows count.
    """

    def __init__(self, counts: Sequence[int], device: torch.device, lengths: Tensor | None = None):
        self.counts = [int(count) for count in counts]
        self.width, self.total = max(self.counts, default=0), sum(self.counts)
        self.lengths, self._packed, self._device = lengths, None, device
        if all(count == self.width for count in self.counts):
            return
        # Made on the host and copied, so that nothing is read back from the device.
        lengths, column = np.array(self.counts), np.arange(self.width)
        real, starts = column < lengths[:, None], lengths.cumsum() - lengths
        parts = (np.flatnonzero(real), np.where(real, starts[:, None] + column, 0), starts, lengths)
        self._packed, self._padded, self._starts, self.lengths = (torch.from_numpy(part).to(device) for part in parts)

    def twice(self) -> "Varlen":
        """The layout of each row and its copy, one after the other."""
        lengths = self.lengths if self._packed is None else None
        counts = [count for count in self.counts for _ in range(2)]
        return Varlen(counts, self._device, None if lengths is None else lengths.repeat_interleave(2))

    @classmethod
    def equal(cls, index: Tensor) -> "Varlen":
        """The layout of rows [B, N] of one length."""
        return cls([index.shape[1]] * len(index), index.device)

    def packed(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [T, ...]."""
        x = x.flatten(0, 1)
        return x if self._packed is None else x.index_select(0, self._packed)

    def padded(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, N, ...]; what fills a row up means nothing."""
        if self._packed is None:
            return x.unflatten(0, (len(self.counts), self.width))
        return x[self._padded]

    def places(self, index: Tensor) -> Tensor:
        """Entries [B, R] of the rows, in 0..N-1, as entries of the packed form."""
        if self._packed is None:
            starts = torch.arange(len(self.counts), device=index.device) * self.width
        else:
            starts = self._starts
        return index + starts[:, None]
