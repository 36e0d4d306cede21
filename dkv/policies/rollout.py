"""The policy of d2Cache (arXiv 2509.23094): masks that will soon be filled, and slots that are much attended to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dkv.core.density import SIGMAS
from dkv.core.schedule import Now
from dkv.core.validation import number, whole
from dkv.kernels.commit.together import best_first
from dkv.policies.base import Policy, View, sources


@dataclass(frozen=True)
class Rollout(Policy):
    """Certain masks, slots that were just filled, and the slots whose keys and values matter most to all others.

    After a pass, the next one computes

    1. the `current_k` best masks, by confidence times certainty density (`dkv.core.density`); those of the block before
       all others, but not in the first pass of a block. Looked at are the masks from the block to the end of the one
       that holds the `current_k`-th mask. And always as many of the block as the pass fills (ours);
    2. the slots that the last pass filled;
    3. of all others the most important one, and further ones by falling importance while they have at most the share
       `rollout_p` of all importance together. A slot is as important as the column of the last pass's attention rollout
       says (`dkv.engine.observe`);
    4. what stands between two of these that are at most `inflate_w` slots apart.

    Two slips of the published code are put right: confidences follow the passes, and blocks keep their size. In a
    shifted model a mask is computed where its output is: in the slot before it. With the "entropy" confidence the
    exponential of the negative entropy stands for a probability (ours).

    Args:
        rollout_p: share of the importance, from 0 to 1.
        current_k: masks, at least 1.
        sigma: of the density, in slots.
        inflate_w: distance of two slots between which gaps are closed; 0: none are.
        refresh: every so many steps of a block, from its first, everything is recomputed (ours); 0 or None: only in the
            first step of all, as published.
    """

    name: ClassVar[str] = "rollout"
    observes: ClassVar[str | None] = "mass"
    by_confidence: ClassVar[bool] = True
    rollout_p: float = 0.1
    current_k: int = 32
    sigma: float = 10.0
    inflate_w: int = 0
    refresh: int | None = None

    def __post_init__(self):
        self._take(number, "rollout_p", 0, 1)
        self._take(number, "sigma", *SIGMAS)
        self._take(whole, "current_k", 1)
        self._take(whole, "inflate_w", 0)
        self._take(whole, "refresh", 0, optional=True)

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.in_block % self.refresh == 0 if self.refresh else now.index == 0

    def active(self, view: View) -> Tensor:
        masks = self._masks(view)
        chosen = view.rows.fresh | (sources(masks) if view.shifted else masks)
        chosen |= self._important(view, view.rows.everywhere & ~chosen)
        return _closed(chosen, self.inflate_w) if self.inflate_w else chosen

    def _masks(self, view: View) -> Tensor:
        """bool [B, S]: the masks that are best by confidence and density."""
        rows, now, most = view.rows, view.now, self.current_k
        masked, open_ = rows.masked, rows.open(now)
        # The block of the `current_k`-th mask is the last that is looked at.
        last = torch.where(masked & (masked.cumsum(1) == most), rows.rank, -1).amax(1, keepdim=True)
        block = (now.stop - now.start).clamp(min=1)
        end = torch.where(last < 0, rows.size, last - (last - now.start) % block + block)
        _, order = best_first(view.confidence.double() + view.density.log(), masked)
        first = open_ & (now.in_block > 0)
        others = masked & (rows.rank < end) & ~first
        needed = (open_.sum(1, keepdim=True) - now.left).clamp(min=1)
        # As many as these, of each kind the best.
        counts = torch.stack((torch.full_like(needed, most), most - first.sum(1, keepdim=True), needed))
        here = torch.stack((first, others, open_)).gather(2, order.expand(3, -1, -1))
        leading = (here & (here.cumsum(2) <= counts)).any(0)
        return torch.zeros_like(masked).scatter_(1, order, leading)

    def _important(self, view: View, others: Tensor) -> Tensor:
        """bool [B, S]: of `others` those with most of the importance."""
        _, order = best_first(view.observed, others)
        share = view.observed.masked_fill(~others, 0).gather(1, order).cumsum(1)
        few = share <= self.rollout_p * share[:, -1:]
        few[:, :1] = True
        return torch.zeros_like(others).scatter_(1, order, few) & others


def _closed(chosen: Tensor, width: int) -> Tensor:
    """bool [B, S]: what is chosen, and all between two neighbours of it that are at most `width` slots apart."""
    size = chosen.shape[1]
    slot = torch.arange(size, device=chosen.device)
    before = torch.where(chosen, slot, -1).cummax(1).values
    after = torch.where(chosen, slot, size).flip(1).cummin(1).values.flip(1)
    return chosen | ((before >= 0) & (after < size) & (after - before <= width))
