"""The policy of DSB (dynamic sliding blocks): what is recomputed follows the region that slides."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.validation import whole
from dkv.policies.base import Policy, View


@dataclass(frozen=True)
class SlidingCache(Policy):
    """The open region and what stands right before it; what was filled earlier, and what follows, is cached.

    A full pass begins each block of the sliding schedule, and fills slots, too. A cached pass computes from `back`
    slots before the first mask to the last slot of the region. `back` is `prefix_window`, or where the first mask
    went on by more slots in the last step so many: a slot is computed anew at least once after it was filled. Slots of
    the prompt count. In a shifted model `back` is at least 1, for the slot that predicts the first mask.

    Args:
        prefix_window: slots before the first mask (published: 24, with blocks of 32).
    """

    name: ClassVar[str] = "sliding"
    slides: ClassVar[bool] = True
    prefix_window: int = 24

    def __post_init__(self):
        self._take(whole, "prefix_window", 0)

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.in_block == 0

    def active(self, view: View) -> Tensor:
        rank, now = view.rows.rank, view.now
        inside = (rank >= now.start) & (rank < now.stop)
        slot = torch.arange(view.rows.size, device=rank.device)
        first = (view.rows.masked.cumsum(1) == 0).sum(1, keepdim=True)
        back = now.moved.clamp(min=max(self.prefix_window, int(view.shifted)))
        last = torch.where(inside, slot, -1)
        return (slot >= first - back) & (slot <= last.amax(1, keepdim=True))
