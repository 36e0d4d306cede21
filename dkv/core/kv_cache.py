"""Keys and values of a whole canvas, one slot per position."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Padded so that every row starts aligned and a kernel may read whole tiles.
SLOT_MULTIPLE = 128


class KVCache:
    """One K and one V tensor per layer, [B, slots, Hkv, D], allocated once and written in place.

    Keys are stored with their rotary embedding. Slots 0 .. length - 1 belong to the canvas. Slot `length` is a
    spare: rows of different lengths are filled up with it, and no query ever sees it.

    Args:
        batch: rows.
        length: slots of the canvas, at least 1.

    Attributes:
        in_use: how many rows are still decoded; they come first.
        tokens, seen: after a generation, the ids on its canvas, int64 [batch, length], and where the keys and
            values were computed while that id stood in the slot, bool. None before.
    """

    def __init__(self, batch: int, length: int):
        if batch < 1 or length < 1:
            raise ValueError(f"a KVCache needs at least one row and one slot, got batch {batch}, length {length}")
        self.batch, self.length = batch, length
        self.slots = -(-(length + 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
        self.in_use, self._order = batch, list(range(batch))
        self.tokens: Tensor | None = None
        self.seen: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer, rows in use; allocated at first use where `like` [..., Hkv, D] lives, in its dtype."""
        if index not in self._layers:
            shape = (self.batch, self.slots, *like.shape[-2:])
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        key, value = self._layers[index]
        return (key, value) if self.in_use == self.batch else (key[: self.in_use], value[: self.in_use])

    def keep(self, rows: Sequence[int]) -> None:
        """Take all rows out of use but these, which then come first and in this order.

        The others change places with them: nothing is allocated for good, and nothing lost.
        """
        order = [*rows, *sorted(set(range(self.in_use)) - set(rows))]
        moved = [new for new, old in enumerate(order) if new != old]
        source = [order[new] for new in moved]
        for pair in self._layers.values():
            for x in pair:
                x[moved] = x[source]
        self._order[: self.in_use] = [self._order[old] for old in order]
        self.in_use = len(rows)

    @property
    def kind(self) -> tuple[int, int, int, torch.dtype] | None:
        """Number of layers, key heads, their size and dtype; None before the first pass."""
        if not self._layers:
            return None
        like = self._layers[0][0]
        return len(self._layers), *like.shape[2:], like.dtype

    def copy_from(self, other: "KVCache", slots: int) -> None:
        """Take over the first `slots` keys and values of every row of a cache with as many rows."""
        places = [other._order.index(row) for row in range(self.batch)]
        for index, pair in other._layers.items():
            for mine, theirs in zip(self.layer(index, pair[0]), pair, strict=True):
                mine[:, :slots] = theirs[places, :slots]
