"""The state of the rows: their tokens, what is masked, and where each stands in its schedule."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dkv.core.schedule import Now, Step, Timetable
from dkv.core.sliding import Region, SlidingTable

# By the kind of device, of what the numbers of slots and of steps are multiples: graphs of one generation then fit the
# next one, whose text is a little longer, and whose first and last blocks have some more slots to fill.
MULTIPLES = {"cuda": 64}


def multiple(count: int, device: torch.device) -> int:
    """A number of slots or steps, or some more."""
    unit = MULTIPLES.get(device.type, 1)
    return -(-count // unit) * unit


def slots_of(mask: Tensor, count: int, spare: int) -> Tensor:
    """The slots where `mask` [B, S] holds, ascending, filled up with `spare`: int64 [B, count]."""
    slot = torch.arange(mask.shape[1], device=mask.device)
    slots = torch.where(mask, slot, spare).sort(dim=1).values[:, :count]
    missing = count - slots.shape[1]
    return slots if missing <= 0 else torch.nn.functional.pad(slots, (0, missing), value=spare)


def mask_of(slots: Tensor, like: Tensor) -> Tensor:
    """bool [B, S], shape and device of `like`: where `slots` [B, n] point; slot S points nowhere."""
    wide = torch.zeros(like.shape[0], like.shape[1] + 1, dtype=torch.bool, device=like.device)
    return wide.scatter_(1, slots, True)[:, :-1]


def outside(gaps: Tensor, size: int) -> Tensor:
    """bool [B, S]: the slots that are not in the gap [B, 2] of their row, its first slot and the one after its last."""
    slot = torch.arange(size, device=gaps.device)
    return (slot < gaps[:, :1]) | (slot >= gaps[:, 1:])


def column(values: Sequence[int | bool], device: torch.device) -> Tensor:
    """One value a row, [B, 1]. Equal values, which are the rule, are not copied to the device."""
    if len(set(values)) == 1:
        return torch.full((len(values), 1), values[0], device=device)
    return torch.tensor(values, device=device).unsqueeze(1)


class Sequences:
    """Token ids of all rows, aligned to the left, so that a slot is also its rotary position.

    The caller's layout has L columns, padding included. Rows have no padding here, hence a row never depends on
    how, or with whom, it was padded. All that changes from step to step is on the device and written in place.

    Args:
        ids: [B, L] int64, checked by the caller. Where `fill` holds, they do not matter.
        real: [B, L] bool, False at padding, which may stand anywhere.
        fill: [B, L] bool, the columns to fill; all of them real.
        mask_token_id: id of a slot without a token. Elsewhere it is an ordinary token.
        room: slots and steps that rows may need which come later; None: no others come.

    Attributes:
        ids: [B, L], as they came.
        tokens: [B, S + 1]; the last column is a spare that no row uses.
        masked: bool [B, S], slots to fill that have no token yet.
        fresh: bool [B, S], slots filled by the last step.
        rank: int64 [B, S], slots to fill counted from the left of their row, from 0; -1 elsewhere.
        fill_end: int64 [B, 1], the slot after the last one to fill; 0 where there is none.
        lengths: int64 [B, 1], slots of each row; `row_lengths` is the same on the host.
        everywhere: bool [B, S], the slots that a row has.
        key_ranges: [B, 2], first and last + 1 of these; None when all rows have all.
        size: S, at least as many slots as the longest row has.
        to_fill, shown: how many slots each row fills, and how many of these stand in the caller's layout; on the host.
        timetable: the schedules, once they are set.
    """

    def __init__(
        self, ids: Tensor, real: Tensor, fill: Tensor, mask_token_id: int, room: tuple[int, int] | None = None
    ):
        self.ids, self.lengths = ids, real.sum(1, keepdim=True)
        self.row_lengths, self.to_fill = self.lengths.flatten().tolist(), fill.sum(1).tolist()
        self.shown = self.to_fill
        slots, self._steps = room or (0, 0)
        self.size = multiple(max(self.row_lengths, default=0), ids.device) if room is None else slots
        # Where each column of the caller's layout stands here; padding on the spare.
        self._slot = torch.where(real, real.cumsum(1) - 1, self.size)
        self.tokens = ids.new_zeros(len(ids), self.size + 1)
        self.tokens.scatter_(1, self._slot, torch.where(fill, mask_token_id, ids * real))
        self.masked = self.from_caller(fill)
        self.rank = torch.where(self.masked, self.masked.cumsum(1) - 1, -1)
        after = torch.arange(self.size + 1, device=ids.device)
        self.fill_end = (torch.nn.functional.pad(self.masked, (1, 0)) * after).amax(1, keepdim=True)
        self.fresh = torch.zeros_like(self.masked)
        self.everywhere = torch.arange(self.size, device=ids.device) < self.lengths
        ranges = torch.cat((torch.zeros_like(self.lengths), self.lengths), 1)
        whole = room is None and all(length == self.size for length in self.row_lengths)
        self.key_ranges = None if whole else ranges
        self.timetable: Timetable | None = None

    @classmethod
    def after_prompts(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        new_tokens: Sequence[int],
        mask_token_id: int,
        pad: int = 0,
        extra: Sequence[int] | None = None,
        room: tuple[int, int] | None = None,
    ) -> "Sequences":
        """Prompts [B, P] with their mask (bool), and `new_tokens` slots to fill after each.

        The caller's layout has P columns and then as many as the longest row of new tokens; the rest holds `pad`.
        `extra` slots are filled behind those of a row, and not shown.
        """
        if extra is not None and any(extra):
            wide = [new + more for new, more in zip(new_tokens, extra, strict=True)]
            rows = cls.after_prompts(input_ids, attention_mask, wide, mask_token_id, pad, room=room)
            return rows._shown(input_ids.shape[1], new_tokens, pad)
        width, device = max(new_tokens, default=0), input_ids.device
        new = torch.arange(width, device=device) < column(list(new_tokens), device)
        ids = torch.cat((input_ids, input_ids.new_full(new.shape, pad)), 1)
        fill = torch.cat((torch.zeros_like(attention_mask), new), 1)
        return cls(ids, torch.cat((attention_mask, new), 1), fill, mask_token_id, room)

    def _shown(self, prompts: int, new_tokens: Sequence[int], pad: int) -> "Sequences":
        """The same rows, of whose slots behind the prompts the caller sees only so many new ones."""
        columns = torch.arange(max(new_tokens), device=self.ids.device)
        beyond = torch.nn.functional.pad(columns >= column(list(new_tokens), self.ids.device), (prompts, 0))
        self._slot = self._slot[:, : beyond.shape[1]].masked_fill(beyond, self.size)
        self.ids, self.shown = self.ids[:, : beyond.shape[1]].masked_fill(beyond, pad), list(new_tokens)
        return self

    def begin(
        self, plans: Sequence[Sequence[Step]], full: Callable[[Now], Tensor], region: Region | None = None
    ) -> None:
        """Set the schedules of the rows; `full` says which steps compute every slot, `region` what slides, if any."""
        steps = multiple(max((self._steps, *map(len, plans))), self.tokens.device)
        if region is None:
            self.timetable = Timetable(plans, self.tokens.device, full, steps)
        else:
            self.timetable = SlidingTable(plans, full, region, self.masked, self.rank, steps)

    def open(self, now: Now) -> Tensor:
        """bool [B, S]: the masked slots of the current blocks."""
        return self.masked & (self.rank >= now.start) & (self.rank < now.stop)

    def cut(self, ends: Tensor, pad: int) -> Tensor:
        """Let the slots to fill from `ends` [B, 1] on take `pad`; returns which they are, bool [B, S]."""
        slot = torch.arange(self.size, device=self.tokens.device)
        beyond = (self.rank >= 0) & (slot >= ends)
        self.tokens[:, :-1].masked_fill_(beyond, pad)
        self.masked &= ~beyond
        return beyond

    def texts(self) -> list[Tensor]:
        """The ids of every row, [length] each, the mask id where there is no token yet."""
        return [row[:length] for row, length in zip(self.tokens, self.row_lengths, strict=True)]

    def in_layout(self) -> Tensor:
        """Token ids [B, L] in the caller's layout, padding as it came."""
        return torch.where(self._slot == self.size, self.ids, self.tokens.gather(1, self._slot))

    def to_caller(self, x: Tensor) -> Tensor:
        """Values [B, S, ...] in the caller's layout; 0 at padding."""
        slot = self._slot.clamp(max=self.size - 1).view(*self._slot.shape, *(1,) * (x.dim() - 2))
        out = x.gather(1, slot.expand(*self._slot.shape, *x.shape[2:]))
        return out.masked_fill((self._slot == self.size).view(slot.shape), 0)

    def from_caller(self, x: Tensor) -> Tensor:
        """Values [B, L] in the caller's layout as [B, S]; 0 where a row ends."""
        out = x.new_zeros(len(x), self.size + 1)
        return out.scatter_(1, self._slot, x)[:, :-1]
