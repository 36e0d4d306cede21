"""Keys and values of a whole canvas, one slot per position."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Padded so that every row starts aligned and a kernel may read whole tiles.
SLOT_MULTIPLE = 128


def _filled(slots: int) -> int:
    return -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE


class KVCache:
    """One K and one V tensor per layer, [B, slots, Hkv, D], written in place.

    Keys are stored with their rotary embedding. Slots 0 .. room - 1 belong to the canvas. Slot `room` is a spare:
    rows of different lengths are filled up with it, and no query ever sees it.

    Args:
        batch: rows.
        length: slots of the canvas, at least 1.
        grows: memory follows what is reached, as in block-causal models, where nothing behind a block is seen: there
            are as many slots as were asked for by `reserve`. Else all are there from the first pass on.

    Attributes:
        slots: of each tensor.
        layers: by number of the layer, its K and V.
        tokens, seen: after a generation, the ids on its canvas, int64 [batch, length], and where the keys and
            values were computed while that id stood in the slot, bool. None before.
        blocks: of a block-causal model, the length of a block and what slots are shifted by before they are divided by
            it, int64 [batch, 1]; None elsewhere.
    """

    def __init__(self, batch: int, length: int, grows: bool = False):
        if batch < 1 or length < 1:
            raise ValueError(f"a KVCache needs at least one row and one slot, got batch {batch}, length {length}")
        self.batch, self.length = batch, length
        self.slots = 0 if grows else _filled(length + 1)
        self.tokens: Tensor | None = None
        self.seen: Tensor | None = None
        self.blocks: tuple[int, Tensor] | None = None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def room(self) -> int:
        """Slots of the canvas that are there; the next one is the spare."""
        return max(min(self.length, self.slots - 1), 0)

    def reserve(self, reach: int) -> None:
        """Have the slots of the canvas before `reach`, and keep what is stored.

        Where they are not there, a quarter of all is added at least, so that copies stay few beside the passes. While a
        layer is copied, it is there twice.
        """
        if self.room >= min(reach, self.length):
            return
        self.slots = min(_filled(self.length + 1), max(_filled(reach + 1), _filled(self.slots * 5 // 4)))
        for index, pair in self.layers.items():
            self.layers[index] = tuple(F.pad(x, (0, 0, 0, 0, 0, self.slots - x.shape[1])) for x in pair)

    def places(self, positions: Tensor) -> Tensor:
        """Slots of a pass, in which those that fill up have any number behind the canvas: these on the spare slot."""
        return positions if self.room == self.length else positions.clamp(max=self.room)

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer; allocated at first use where `like` [..., Hkv, D] lives, in its dtype."""
        if index not in self.layers:
            shape = (self.batch, self.slots, *like.shape[-2:])
            self.layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[index]

    def visible(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer that is there, [B, room, Hkv, D], without the slots behind the canvas."""
        key, value = self.layers[index]
        return key[:, : self.room], value[:, : self.room]

    @property
    def kind(self) -> tuple[int, int, int, torch.dtype] | None:
        """Number of layers, key heads, their size and dtype; None before the first pass."""
        if not self.layers:
            return None
        like = self.layers[0][0]
        return len(self.layers), *like.shape[2:], like.dtype

    def copy_from(self, other: "KVCache", slots: int) -> None:
        """Take over the first `slots` keys and values of every row of a cache with as many rows."""
        self.reserve(slots)
        for index, pair in other.layers.items():
            for mine, theirs in zip(self.layer(index, pair[0]), pair, strict=True):
                mine[:, :slots] = theirs[:, :slots]
