"""Rows of different lengths, side by side for attention and one after the other for everything else."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Varlen:
    """The layout of B rows with `counts` entries each: [B, N, ...] filled up to the longest, or [T, ...] packed.

    Products, norms and the choice of tokens see [T, ...], so that a short row costs what it costs alone.
    Where all rows are of one length, both forms are views of one another.

    Args:
        counts: entries of each row, known to the host.
        device: where the entries live.

    Attributes:
        width, total: N and T.
        lengths: int64 [B] on the device; None where all rows are of one length.
    """

    def __init__(self, counts: Sequence[int], device: torch.device):
        self.counts = [int(count) for count in counts]
        self.width, self.total = max(self.counts, default=0), sum(self.counts)
        self.lengths = None
        if all(count == self.width for count in self.counts):
            return
        # Made on the host and copied, so that nothing is read back from the device.
        lengths, column = np.array(self.counts), np.arange(self.width)
        real, starts = column < lengths[:, None], lengths.cumsum() - lengths
        parts = (np.flatnonzero(real), np.where(real, starts[:, None] + column, 0), starts, lengths)
        self._packed, self._padded, self._starts, self.lengths = (torch.from_numpy(part).to(device) for part in parts)

    @classmethod
    def equal(cls, index: Tensor) -> "Varlen":
        """The layout of rows [B, N] of one length."""
        return cls([index.shape[1]] * len(index), index.device)

    def packed(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [T, ...]."""
        x = x.flatten(0, 1)
        return x if self.lengths is None else x.index_select(0, self._packed)

    def padded(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, N, ...]; what fills a row up means nothing."""
        if self.lengths is None:
            return x.unflatten(0, (len(self.counts), self.width))
        return x[self._padded]

    def places(self, index: Tensor) -> Tensor:
        """Entries [B, R] of the rows, in 0..N-1, as entries of the packed form."""
        if self.lengths is None:
            starts = torch.arange(len(self.counts), device=index.device) * self.width
        else:
            starts = self._starts
        return index + starts[:, None]
