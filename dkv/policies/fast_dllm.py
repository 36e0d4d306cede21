"""The policies of Fast-dLLM (Wu et al. 2025): what is recomputed follows from the current block."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.validation import flag
from dkv.policies.base import Policy, View


@dataclass(frozen=True)
class _BlockCache(Policy):
    """What both have in common: a full pass begins each block, and fills slots, too (published code, LLaDA)."""

    delayed: bool = False

    def __post_init__(self):
        flag("delayed", self.delayed)

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.in_block == 0

    def active(self, view: View) -> Tensor:
        reach = self._reach(view)
        return view.with_sources(reach & view.unsettled if self.delayed else reach)

    @abstractmethod
    def _reach(self, view: View) -> Tensor:
        """bool [B, S]: the slots of a cached step, before the delay."""


@dataclass(frozen=True)
class PrefixCache(_BlockCache):
    """The current block and everything after it; what stands before the block is cached.

    In a shifted model the slot that predicts the first of the block is computed as well.

    Args:
        delayed: slots leave the active set one step after they were filled, as in `DecodeCache`.
    """

    name: ClassVar[str] = "prefix"

    def _reach(self, view: View) -> Tensor:
        return view.from_on(view.now.start)


@dataclass(frozen=True)
class DualCache(_BlockCache):
    """The current block alone; what stands before and after it is cached.

    Full passes and arguments are those of `PrefixCache`. In a block-causal model the block is a part of its own
    (`block_length`), and a full pass computes all of that; where outputs predict the next slot, every pass does until
    the first slot of the part is filled (Fast-dLLM v2, `use_block_cache`).
    """

    name: ClassVar[str] = "dual"
    in_blocks: ClassVar[bool] = True

    def active(self, view: View) -> Tensor:
        if view.now.end is None:
            return super().active(view)
        now, slot = view.now, torch.arange(view.rows.size, device=view.rows.rank.device)
        inside = (slot >= now.part) & (slot < now.part_end)
        if self.delayed:
            inside &= view.with_sources(view.unsettled)
        if not view.shifted:
            return inside
        waits = (view.rows.masked & (slot == now.part)).any(1, keepdim=True)
        return torch.where(waits, view.rows.everywhere, inside)

    def _reach(self, view: View) -> Tensor:
        rank = view.rows.rank
        return (rank >= view.now.start) & (rank < view.now.stop)
