"""Keys and values of a whole canvas, one slot per position."""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels.common.stored import SCALES, Stored

# Padded so that every row starts aligned and a kernel may read whole tiles.
SLOT_MULTIPLE = 128
# What keys and values may be kept in: the dtype of the model, or 8 bits and a scale for each slot and head.
DTYPES = ("auto", "int8")


def _filled(slots: int) -> int:
    return -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE


def head_bytes(size: int, model: torch.dtype, dtype: str = "auto") -> int:
    """Bytes of the key, or the value, of a slot and head of `size` numbers, where a cache is of this dtype."""
    return size + SCALES.itemsize if dtype == "int8" else size * model.itemsize


class KVCache:
    """K and V of every layer, [B, slots, Hkv, D], written in place.

    Keys are stored with their rotary embedding. Slots 0 .. room - 1 belong to the canvas. Slot `room` is a spare:
    rows of different lengths are filled up with it, and no query ever sees it.

    Args:
        batch: rows.
        length: slots of the canvas, at least 1.
        grows: memory follows what is reached, as in block-causal models, where nothing behind a block is seen: there
            are as many slots as were asked for by `reserve`. Else all are there from the first pass on.
        dtype: "int8": each head of a slot is rounded where it is written, to whole numbers of 8 bits and a scale.
            "auto": they are kept in the dtype of the model.

    Attributes:
        slots: of each buffer.
        layers: by number of the layer, its K and V.
        tokens, seen: after a generation, the ids on its canvas, int64 [batch, length], and where the keys and
            values were computed while that id stood in the slot, bool. None before.
        blocks: of a block-causal model, the length of a block and what slots are shifted by before they are divided by
            it, int64 [batch, 1]; None elsewhere.
    """

    def __init__(self, batch: int, length: int, grows: bool = False, dtype: str = "auto"):
        if batch < 1 or length < 1:
            raise ValueError(f"a KVCache needs at least one row and one slot, got batch {batch}, length {length}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.batch, self.length, self.dtype = batch, length, dtype
        self.slots = 0 if grows else _filled(length + 1)
        self.tokens: Tensor | None = None
        self.seen: Tensor | None = None
        self.blocks: tuple[int, Tensor] | None = None
        self.layers: dict[int, tuple[Stored, Stored]] = {}

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
            self.layers[index] = tuple(Stored(*(self._grown(x) for x in one)) for one in pair)

    def _grown(self, x: Tensor | None) -> Tensor | None:
        """x [B, S, ...] with all slots, those that are new filled with 0."""
        return x if x is None else F.pad(x, (*(0, 0) * (x.dim() - 2), 0, self.slots - x.shape[1]))

    def places(self, positions: Tensor) -> Tensor:
        """Slots of a pass, in which those that fill up have any number behind the canvas: these on the spare slot."""
        return positions if self.room == self.length else positions.clamp(max=self.room)

    def layer(self, index: int, like: Tensor) -> tuple[Stored, Stored]:
        """K and V of a layer; allocated at first use where `like` [..., Hkv, D] lives, in its dtype or in 8 bits."""
        if index not in self.layers:
            self.layers[index] = self._zeros(like), self._zeros(like)
        return self.layers[index]

    def _zeros(self, like: Tensor) -> Stored:
        shape = (self.batch, self.slots, *like.shape[-2:])
        if self.dtype == "auto":
            return Stored(like.new_zeros(shape))
        return Stored(like.new_zeros(shape, dtype=torch.int8), like.new_zeros(shape[:-1], dtype=SCALES))

    def visible(self, index: int) -> tuple[Stored, Stored]:
        """K and V of a layer that is there, [B, room, Hkv, D], without the slots behind the canvas."""
        key, value = self.layers[index]
        here = slice(None), slice(self.room)
        return key.at(here), value.at(here)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are there."""
        return sum(x.nbytes for x in chain(*self.layers.values()))

    @property
    def kind(self) -> tuple[int, int, int, torch.dtype] | None:
        """Number of layers, key heads, their size and dtype; None before the first pass."""
        if not self.layers:
            return None
        like = self.layers[0][0].numbers
        return len(self.layers), *like.shape[2:], like.dtype

    def copy_from(self, other: "KVCache", slots: int) -> None:
        """Take over the first `slots` keys and values of every row of a cache of this dtype with as many rows."""
        self.reserve(slots)
        for index, pair in other.layers.items():
            for mine, theirs in zip(chain(*self.layer(index, pair[0].numbers)), chain(*pair), strict=True):
                if mine is not None:
                    mine[:, :slots] = theirs[:, :slots]
