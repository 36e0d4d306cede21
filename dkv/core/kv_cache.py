"""Keys and values of a whole canvas, one slot per position."""

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
        layers: by number of the layer, its K and V.
        tokens, seen: after a generation, the ids on its canvas, int64 [batch, length], and where the keys and
            values were computed while that id stood in the slot, bool. None before.
        blocks: of a block-causal model, the length of a block and what slots are shifted by before they are divided by
            it, int64 [batch, 1]; None elsewhere.
    """

    def __init__(self, batch: int, length: int):
        if batch < 1 or length < 1:
            raise ValueError(f"a KVCache needs at least one row and one slot, got batch {batch}, length {length}")
        self.batch, self.length = batch, length
        self.slots = -(-(length + 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
        self.tokens: Tensor | None = None
        self.seen: Tensor | None = None
        self.blocks: tuple[int, Tensor] | None = None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer; allocated at first use where `like` [..., Hkv, D] lives, in its dtype."""
        if index not in self.layers:
            shape = (self.batch, self.slots, *like.shape[-2:])
            self.layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[index]

    def visible(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer that is there, [B, length, Hkv, D], without the slots behind the canvas."""
        key, value = self.layers[index]
        return key[:, : self.length], value[:, : self.length]

    @property
    def kind(self) -> tuple[int, int, int, torch.dtype] | None:
        """Number of layers, key heads, their size and dtype; None before the first pass."""
        if not self.layers:
            return None
        like = self.layers[0][0]
        return len(self.layers), *like.shape[2:], like.dtype

    def copy_from(self, other: "KVCache", slots: int) -> None:
        """Take over the first `slots` keys and values of every row of a cache with as many rows."""
        for index, pair in other.layers.items():
            for mine, theirs in zip(self.layer(index, pair[0]), pair, strict=True):
                mine[:, :slots] = theirs[:, :slots]
