"""The canvas: every row's text and its slots to fill, without padding between them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def slots_of(mask: Tensor, count: int, spare: int) -> Tensor:
    """The slots where `mask` [B, S] holds, ascending, filled up with `spare`: int64 [B, count].

    `count` is known to the host, so that nothing has to be read back from the device.
    """
    slot = torch.arange(mask.shape[1], device=mask.device)
    slots = torch.where(mask, slot, spare).sort(dim=1).values[:, :count]
    missing = count - slots.shape[1]
    return slots if missing <= 0 else torch.nn.functional.pad(slots, (0, missing), value=spare)


def mask_of(slots: Tensor, like: Tensor) -> Tensor:
    """bool [B, S], shape and device of `like`: where `slots` [B, n] point; slot S points nowhere."""
    wide = torch.zeros(like.shape[0], like.shape[1] + 1, dtype=torch.bool, device=like.device)
    return wide.scatter_(1, slots, True)[:, :-1]


def column(values: Sequence[int | bool], device: torch.device) -> Tensor:
    """One value a row, [B, 1]. Equal values, which are the rule, are not copied to the device."""
    if len(set(values)) == 1:
        return torch.full((len(values), 1), values[0], device=device)
    return torch.tensor(values, device=device).unsqueeze(1)


class Canvas:
    """Token ids of all rows, aligned to the left, so that a slot is also its rotary position.

    The caller's layout has L columns, padding included. Rows on the canvas have no padding, hence a
    row never depends on how, or with whom, it was padded.

    Args:
        ids: [B, L] int64, checked by the caller. Where `fill` holds, they do not matter.
        real: [B, L] bool, False at padding, which may stand anywhere.
        fill: [B, L] bool, the columns to fill; all of them real.
        mask_token_id: id of a slot without a token. Elsewhere it is an ordinary token.

    Attributes:
        tokens: [B, S + 1]; the last column is a spare that no row uses.
        masked: bool [B, S], slots to fill that have no token yet.
        fresh: bool [B, S], slots filled by the last step.
        rank: int64 [B, S], slots to fill counted from the left of their row, from 0; -1 elsewhere.
        everywhere: bool [B, S], the slots that a row has.
        key_ranges: [B, 2], first and last + 1 of these; None when all rows have all.
        size: S.
        row_lengths: slots of each row, known to the host.
        to_fill: the slots to fill of each row, ascending, known to the host.
    """

    def __init__(self, ids: Tensor, real: Tensor, fill: Tensor, mask_token_id: int):
        self.ids = ids
        lengths, real_host, fill_host = real.sum(1, keepdim=True), real.cpu().numpy(), fill.cpu().numpy()
        self.row_lengths = real_host.sum(1)
        self.to_fill = [np.flatnonzero(f[r]) for r, f in zip(real_host, fill_host, strict=True)]
        self.size = int(self.row_lengths.max(initial=0))
        self.lengths = lengths
        # Where each column of the caller's layout stands on the canvas; padding on the spare.
        self._slot = torch.where(real, real.cumsum(1) - 1, self.size)
        self.tokens = ids.new_zeros(len(ids), self.size + 1)
        self.tokens.scatter_(1, self._slot, torch.where(fill, mask_token_id, ids * real))
        self.masked = self.from_caller(fill)
        self.rank = torch.where(self.masked, self.masked.cumsum(1) - 1, -1)
        self.fresh = torch.zeros_like(self.masked)
        self._measure()

    @classmethod
    def after_prompts(
        cls, input_ids: Tensor, attention_mask: Tensor, new_tokens: Sequence[int], mask_token_id: int, pad: int = 0
    ) -> "Canvas":
        """Prompts [B, P] with their mask (bool), and `new_tokens` slots to fill after each.

        The caller's layout has P columns and then as many as the longest row fills; the rest holds `pad`.
        """
        width, device = max(new_tokens, default=0), input_ids.device
        new = torch.arange(width, device=device) < column(list(new_tokens), device)
        ids = torch.cat((input_ids, input_ids.new_full(new.shape, pad)), 1)
        fill = torch.cat((torch.zeros_like(attention_mask), new), 1)
        return cls(ids, torch.cat((attention_mask, new), 1), fill, mask_token_id)

    def _measure(self) -> None:
        """What follows from the rows that there are: once, not in every step."""
        self.everywhere = torch.arange(self.size, device=self.tokens.device) < self.lengths
        ranges = torch.cat((torch.zeros_like(self.lengths), self.lengths), 1)
        self.key_ranges = None if (self.row_lengths == self.size).all() else ranges

    def span(self, start: Tensor, stop: Tensor) -> Tensor:
        """bool [B, S]: the slots to fill from number `start` to `stop` of their row, both [B, 1]."""
        return (self.rank >= start) & (self.rank < stop)

    def commit(self, slots: Tensor, committed: Tensor) -> None:
        """Note that the entries `committed` (bool [B, n]) of `slots` [B, n] have just been filled."""
        fresh = torch.zeros(len(slots), self.size + 1, dtype=torch.bool, device=slots.device)
        self.fresh = fresh.scatter_(1, slots, committed)[:, :-1]
        self.masked = self.masked & ~self.fresh

    def cut(self, ends: Tensor, pad: int) -> Tensor:
        """Let the slots to fill from `ends` [B, 1] on take `pad`; returns which they are, bool [B, S]."""
        slot = torch.arange(self.size, device=self.tokens.device)
        beyond = (self.rank >= 0) & (slot >= ends)
        self.tokens[:, :-1] = torch.where(beyond, pad, self.tokens[:, :-1])
        self.masked = self.masked & ~beyond
        return beyond

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        index = torch.tensor(rows, device=self.tokens.device)
        for name in ("ids", "lengths", "_slot", "tokens", "masked", "fresh", "rank"):
            setattr(self, name, getattr(self, name)[index])
        self.row_lengths, self.to_fill = self.row_lengths[rows], [self.to_fill[row] for row in rows]
        self._measure()

    def texts(self) -> list[Tensor]:
        """The ids of every row, [length] each, the mask id where there is no token yet."""
        return [row[:length] for row, length in zip(self.tokens, self.row_lengths.tolist(), strict=True)]

    def sequences(self) -> Tensor:
        """Token ids [B, L] in the caller's layout, padding as it came."""
        return torch.where(self._slot == self.size, self.ids, self.tokens.gather(1, self._slot))

    def to_caller(self, x: Tensor) -> Tensor:
        """Values [B, S, ...] on the canvas in the caller's layout; 0 at padding."""
        slot = self._slot.clamp(max=self.size - 1).view(*self._slot.shape, *(1,) * (x.dim() - 2))
        out = x.gather(1, slot.expand(*self._slot.shape, *x.shape[2:]))
        return out.masked_fill((self._slot == self.size).view(slot.shape), 0)

    def from_caller(self, x: Tensor) -> Tensor:
        """Values [B, L] in the caller's layout on the canvas [B, S]; 0 where a row ends."""
        out = x.new_zeros(len(x), self.size + 1)
        return out.scatter_(1, self._slot, x)[:, :-1]
