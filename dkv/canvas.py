"""The canvas: every row's prompt and its slots to fill, without padding between them."""

import torch
from torch import Tensor


def slots_of(mask: Tensor, count: int, spare: int) -> Tensor:
    """The slots where `mask` [B, S] holds, ascending, filled up with `spare`: int64 [B, count].

    `count` is known to the host, so that nothing has to be read back from the device.
    """
    slot = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, slot, spare).sort(dim=1).values[:, :count]


def mask_of(slots: Tensor, like: Tensor) -> Tensor:
    """bool [B, S], shape and device of `like`: where `slots` [B, n] point; slot S points nowhere."""
    wide = torch.zeros(like.shape[0], like.shape[1] + 1, dtype=torch.bool, device=like.device)
    return wide.scatter_(1, slots, True)[:, :-1]


class Canvas:
    """Token ids of all rows, aligned to the left, so that a slot is also its rotary position.

    The caller's layout has one column per prompt id, padding included, and then the new ones. Rows
    on the canvas have no padding: row b is its `prompt_lengths[b]` real ids and its masks. Hence a
    row never depends on how, or with whom, it was padded.

    Args:
        input_ids: [B, P] int64, checked by the caller.
        attention_mask: [B, P] bool, False at padding, which may stand anywhere.
        new_tokens: slots to fill per row.
        mask_token_id: id of a slot without a token.

    Attributes:
        tokens: [B, S + 1]; the last column is a spare that no row uses.
        masked: bool [B, S], slots to fill that have no token yet. A mask id in the prompt is an
            ordinary token.
        fresh: bool [B, S], slots filled by the last step.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int, mask_token_id: int):
        batch, device = len(input_ids), input_ids.device
        self.input_ids, self.new_tokens = input_ids, new_tokens
        self.prompt_lengths = attention_mask.sum(1, keepdim=True)
        self.lengths = self.prompt_lengths + new_tokens
        lengths = self.lengths.flatten().tolist()
        self.size, self.slots_in_use, self.ragged = max(lengths), sum(lengths), len(set(lengths)) > 1
        # Where each column of the caller's layout stands on the canvas; padding on the spare.
        prompt_slot = torch.where(attention_mask, attention_mask.cumsum(1) - 1, self.size)
        new_slot = self.prompt_lengths + torch.arange(new_tokens, device=device)
        self._slot = torch.cat((prompt_slot, new_slot), 1)
        masks = input_ids.new_full((batch, new_tokens), mask_token_id)
        self.tokens = input_ids.new_zeros(batch, self.size + 1)
        self.tokens.scatter_(1, self._slot, torch.cat((input_ids * attention_mask, masks), 1))
        slot = torch.arange(self.size, device=device)
        self.masked = (slot >= self.prompt_lengths) & (slot < self.lengths)
        self.fresh = torch.zeros_like(self.masked)

    @property
    def key_ranges(self) -> Tensor | None:
        """[B, 2], the slots that a row has; None when all rows have all."""
        return torch.cat((torch.zeros_like(self.lengths), self.lengths), 1) if self.ragged else None

    def span(self, start: int, stop: int) -> Tensor:
        """bool [B, S]: the slots `start` to `stop`, counted from the end of the prompt."""
        slot = torch.arange(self.size, device=self.tokens.device)
        return (slot >= self.prompt_lengths + start) & (slot < self.prompt_lengths + stop)

    def commit(self, slots: Tensor, committed: Tensor) -> None:
        """Note that the entries `committed` (bool [B, n]) of `slots` [B, n] have just been filled."""
        fresh = torch.zeros(len(slots), self.size + 1, dtype=torch.bool, device=slots.device)
        self.fresh = fresh.scatter_(1, slots, committed)[:, :-1]
        self.masked = self.masked & ~self.fresh

    def sequences(self) -> Tensor:
        """Token ids [B, P + new tokens] in the caller's layout, padding as it came."""
        out = self.tokens.gather(1, self._slot)
        width = self.input_ids.shape[1]
        padded = self._slot[:, :width] == self.size
        out[:, :width] = torch.where(padded, self.input_ids, out[:, :width])
        return out

    def to_caller(self, x: Tensor) -> Tensor:
        """Values [B, S, ...] on the canvas in the caller's layout; 0 at padding."""
        slot = self._slot.clamp(max=self.size - 1).view(*self._slot.shape, *(1,) * (x.dim() - 2))
        out = x.gather(1, slot.expand(*self._slot.shape, *x.shape[2:]))
        return out.masked_fill((self._slot == self.size).view(slot.shape), 0)

    def from_caller(self, x: Tensor) -> Tensor:
        """Values [B, P + new tokens] in the caller's layout on the canvas [B, S]; 0 where a row ends."""
        out = x.new_zeros(len(x), self.size + 1)
        return out.scatter_(1, self._slot, x)[:, :-1]
