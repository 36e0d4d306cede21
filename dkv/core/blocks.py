"""Block-causal models: a slot sees its own block and all before it, so a finished block is stored for good.

What a pass computes ends with the block that is filled, and begins with the first slot that is not stored: the last
block is stored, with its final tokens, by the pass that begins the next one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dkv.core.kv_cache import KVCache
from dkv.core.schedule import Now, Step, quotas, shares


@dataclass(frozen=True)
class BlockRule:
    """How a family counts its blocks and begins them.

    Attributes:
        length: slots of a block.
        from_prompt: blocks are counted from the first slot to fill, and before it (BD3LM); else from slot 0, prompt
            included (LLaDA2, SDAR, Fast-dLLM v2).
        seeded: the first slot of a block, where it is to be filled, is so before the others: by the pass that stores
            the block before it, whose last output predicts it (Fast-dLLM v2, Nemotron).
        causal: what is stored is computed causally: a slot before the block sees itself and what stands before it
            (Nemotron).
    """

    length: int
    from_prompt: bool = False
    seeded: bool = False
    causal: bool = False

    def offset(self, first: int) -> int:
        """What is added to a slot before it is divided by the length; `first` is the first slot to fill."""
        return -first % self.length if self.from_prompt else 0

    def ends(self, positions: Tensor, offset: Tensor, first: Tensor) -> Tensor:
        """int64: the slot after the last one that each slot sees, while the block from `first` on is filled."""
        end = ((positions + offset) // self.length + 1) * self.length - offset
        return torch.where(positions < first, positions + 1, end) if self.causal else end

    def extra(self, first: int, new: int) -> int:
        """Slots behind the last of `new` ones that belong to its block, and are filled with it."""
        return 0 if self.from_prompt or not new else -(first + new) % self.length


def blocks_of(slots: Sequence[int], rule: BlockRule, part: int) -> Iterator[tuple[bool, int, int, list[int]]]:
    """The parts of blocks in which the slots to fill lie, from left to right.

    Yields:
        Whether this is a seed; the first slot of the block, and the one after its last; and the slots to fill. A seed
        is filled by a pass that ends before it.
    """
    offset = rule.offset(slots[0]) if slots else 0
    for block, inside in groupby(slots, lambda slot: (slot + offset) // rule.length):
        first, held = block * rule.length - offset, list(inside)
        end = first + rule.length
        if rule.seeded and held[0] == first > 0:
            yield True, first, first, [held.pop(0)]
        for _, own in groupby(held, lambda slot: (slot + offset) // part):
            yield False, max(first, 0), end, list(own)


def slot_schedule(
    slots: Sequence[int],
    size: int,
    rule: BlockRule,
    part: int,
    steps: int | None,
    rounded: bool = False,
    edited: bool = False,
) -> list[Step]:
    """The steps of a row: blocks from left to right, and parts of them, with equal shares of each in its steps.

    Where a part has fewer masks than slots, as that behind a prompt, the shares are still those of all its slots, as
    published (LLaDA2, SDAR), and the steps that remain are not made.

    Args:
        slots: to fill, ascending.
        size: slots of the row.
        rule: of the model.
        part: slots of a part, which are open at a time; the length is a multiple of it.
        steps: in all, at least one for each part; None: one for each slot.
        rounded: as for `quotas`.
        edited: each part has one step, which is taken again as long as it changes anything.

    Raises:
        ValueError: fewer steps than parts.
    """
    found, offset = list(blocks_of(slots, rule, part)), rule.offset(slots[0]) if slots else 0
    if edited and found:
        # The last slot only stands for the row's not being finished: it takes no share of the steps.
        found[-1] = (True, *found[-1][1:])
    parts = sum(not seed for seed, *_ in found)
    if steps is not None and steps < parts:
        raise ValueError(
            f"steps ({steps}) is the total over all blocks and must be at least their number: the slots to fill lie "
            f"in {parts} blocks of {part}"
        )
    plan: list[Step] = []
    rank, of_parts = 0, iter(shares(steps, parts, rounded) if steps is not None and parts else ())
    for block, (seed, first, end, own) in enumerate(found):
        begin = (own[0] + offset) // part * part - offset
        width = 1 if seed else min(part, size - begin)
        share = width if seed or steps is None else next(of_parts)
        start, rank, left = rank, rank + len(own), len(own)
        for i, least in enumerate(quotas(width, share, rounded)):
            count, left = min(least, left), max(left - least, 0)
            reach = {"first": first, "end": min(end, size), "part": begin, "part_end": begin + part}
            plan.append(Step(len(plan), block, i, start, rank, count, left, **reach, least=least))
            if edited or not left:
                break
    return plan


class Blocks:
    """Where the rows of a block-causal model stand, on the device.

    Args:
        rule: of the model.
        masked: bool [B, S], slots to fill.

    Attributes:
        offset: int64 [B, 1], what is added to the slots of a row before they are divided by the length.
        stored: int64 [B, 1], changed in place: keys and values of the slots before this one stay.
        stores: int64 [B, 1], changed in place: passes that stored a block, or what stands before the first one.
    """

    def __init__(self, rule: BlockRule, masked: Tensor):
        self.rule = rule
        first = (masked.cumsum(1) == 0).sum(1, keepdim=True)
        self.offset = -first % rule.length if rule.from_prompt else torch.zeros_like(first)
        self._slot = torch.arange(masked.shape[1], device=masked.device)
        self.stored, self.stores = torch.zeros_like(first), torch.zeros_like(first)

    def open(self, now: Now, masked: Tensor, shifted: bool) -> Tensor:
        """bool [B, S]: the slots of the current block, and those before it that are not stored yet."""
        first = self.stored
        if shifted:
            # The slot before the block, as long as it predicts the first one of it.
            waits = (masked & (self._slot == now.first)).any(1, keepdim=True)
            first = torch.where(waits, torch.minimum(first, (now.first - 1).clamp(min=0)), first)
        return (self._slot >= first) & (self._slot < now.end)

    def hidden(self, now: Now, lengths: Tensor) -> Tensor:
        """int64 [B, 2]: the gap of slots behind the current block, in rows of so many slots [B, 1]."""
        return torch.cat((now.end, lengths), 1)

    def ends(self, positions: Tensor, rows: Tensor, now: Now) -> Tensor:
        """int64 [T]: the slot after the last one that each entry of a pass sees."""
        return self.rule.ends(positions, *(x.squeeze(1).index_select(0, rows) for x in (self.offset, now.first)))

    def passed(self, now: Now, active: Tensor) -> None:
        """Note that the step was computed in the rows that have `active` slots, bool [B, S]."""
        begins = active.any(1, keepdim=True) & (now.first > self.stored)
        self.stores += begins
        self.stored.copy_(torch.where(begins, now.first, self.stored))

    def keep(self, cache: KVCache) -> None:
        """Tell a cache which keys and values any longer text would have too, and how blocks were counted."""
        cache.seen, cache.blocks = self._slot < self.stored, (self.rule.length, self.offset)

    def merged_stores(self) -> int:
        """Passes that were spared, as others stored what they would have; reads the device."""
        return 0 if self.rule.seeded else int(self.stores.sum())

    def take_over(self, known: Tensor) -> Tensor:
        """Begin behind so many slots whose keys and values are known, int64 [B, 1], or as many as are whole blocks."""
        length = 1 if self.rule.causal else self.rule.length
        offset = self.offset % length
        self.stored.copy_(((known + offset) // length * length - offset).clamp(min=0))
        return self.stored
