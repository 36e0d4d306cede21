"""The sliding schedule: its steps are made on the device as the rows go, from what is masked.

The open region of a row begins as its first block and grows by a slot for each one that is filled; its left edge
follows the first mask (DSB: dynamic sliding blocks).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dkv.core.schedule import Now, Step, Timetable
from dkv.kernels.plan.reference import FIELDS


@dataclass(frozen=True)
class Region:
    """How the open region slides. Lengths are in slots to fill.

    Attributes:
        block_length: of the region at first. When so many slots were filled, the next block begins.
        most: no region is longer; None: it may reach the end of the row.
    """

    block_length: int
    most: int | None


class SlidingTable(Timetable):
    """The steps that the rows are about to take, each made from the state that the last one left.

    `start` is the first mask, `stop` lies `block_length` beyond the slots that are filled, at most the end of the row
    or start + `most`. As many slots are filled as it takes to keep up with the plan of the row, if so many are open.

    Args:
        plans: by row, its steps without regions: what is left after each of them.
        full: as for `Timetable`; asked for every step.
        region: how it slides.
        masked, rank: of the rows, bool and int64 [B, S], before the first step.
        room: steps that a plan may have at least.

    Attributes:
        table: int64 [B, 1, fields], `current` itself: going on in the table changes nothing.
        moved: int64 [B, 1], by how many slots of the row, whatever they are, the first mask went on in the last step.
    """

    def __init__(
        self,
        plans: Sequence[Sequence[Step]],
        full: Callable[[Now], Tensor],
        region: Region,
        masked: Tensor,
        rank: Tensor,
        room: int = 0,
    ):
        super().__init__(plans, masked.device, room=room)
        self._full, self._region = full, region
        self._left = self.table[..., FIELDS.index("left")].clone()
        self.table = self.current.unsqueeze(1)
        self._to_fill = masked.sum(1, keepdim=True)
        # Masks when the block began, and the slot of the first one.
        self._begun, self._first = self._to_fill.clone(), (masked.cumsum(1) == 0).sum(1, keepdim=True)
        self.moved = torch.zeros_like(self._first)
        # The step before the first one.
        self.current.fill_(-1)
        self.follow(masked, rank)

    def follow(self, masked: Tensor, rank: Tensor) -> None:
        before, region, to_fill = self.now(), self._region, self._to_fill
        missing, known = masked.sum(1, keepdim=True), masked.cumsum(1) == 0
        first, start = known.sum(1, keepdim=True), (known & (rank >= 0)).sum(1, keepdim=True)
        stop = torch.minimum(to_fill - missing + region.block_length, to_fill)
        if region.most is not None:
            stop = torch.minimum(stop, start + region.most)
        open_, index = (masked & (rank < stop)).sum(1, keepdim=True), before.index + 1
        due = missing - self._left.gather(1, index.clamp(max=self._left.shape[1] - 1))
        begins = self._begun - missing >= region.block_length
        fields = {
            "index": index,
            "in_block": torch.where(begins, 0, before.in_block + 1),
            "start": start,
            "stop": stop,
            "left": (open_ - due).clamp(min=0),
            "next_block": index,
            "full": torch.zeros_like(index),
        }
        self._begun.copy_(torch.where(begins, missing, self._begun))
        self.moved.copy_(first - self._first)
        self._first.copy_(first)
        self.current.copy_(torch.cat([fields[name] for name in FIELDS], 1))
        self.now().full.copy_(self._full(self.now()))

    def now(self) -> Now:
        return Now(self.current, None, self.moved)
