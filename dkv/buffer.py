"""Keys and values of a whole canvas, one slot per position."""

from torch import Tensor

# Padded so that every row starts aligned and a kernel may read whole tiles.
SLOT_MULTIPLE = 128


class KVBuffer:
    """One K and one V tensor per layer, [B, slots, Hkv, D], allocated once and written in place.

    Slots 0 .. length - 1 belong to the canvas. Slot `length` is a spare: ragged rows are filled up
    with it, and no query ever sees it.

    Args:
        batch: rows.
        length: slots of the canvas, at least 1.
        rotated: keys are stored with their rotary embedding (False: without, as published, so that
            all of them are rotated again in every pass).
    """

    def __init__(self, batch: int, length: int, *, rotated: bool = True):
        if batch < 1 or length < 1:
            raise ValueError(f"a buffer needs at least one row and one slot, got batch {batch}, length {length}")
        self.batch, self.length, self.rotated = batch, length, rotated
        self.slots = -(-(length + 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer, allocated at first use where `like` [B, N, Hkv, D] lives, in its dtype."""
        found = self._layers.get(index)
        if found is None:
            shape = (self.batch, self.slots, *like.shape[2:])
            found = self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return found
