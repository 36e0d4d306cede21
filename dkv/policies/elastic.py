"""After Elastic-Cache (arXiv 2510.14973): everything is recomputed once attention has turned."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.sequences import Sequences
from dkv.core.validation import number, whole
from dkv.policies.base import Policy, View


@dataclass(frozen=True)
class ElasticCache(Policy):
    """The leftmost masks and the slots that were just filled; and everything in the pass after attention has turned.

    In every layer the known slot that got most attention from the leftmost masks is watched. Where the attention that
    it gets from them in the next pass has a cosine below `gamma` with that of before, in any layer, attention has
    turned (`dkv.engine.watch`). From the paper, whose code was not at hand. The timing is ours: the paper recomputes
    the deeper layers of the same pass, and here the whole next pass is full, as that is decided once a pass.

    Args:
        window: masks that are computed, from the left, at least 1; always as many as the pass fills.
        gamma: from 0, where nothing is ever recomputed, to 1.
    """

    name: ClassVar[str] = "elastic"
    observes: ClassVar[str | None] = "turn"
    by_confidence: ClassVar[bool] = True
    window: int = 16
    gamma: float = 0.9

    def __post_init__(self):
        self._take(whole, "window", 1)
        self._take(number, "gamma", 0, 1)

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.index == 0

    def active(self, view: View) -> Tensor:
        cached = view.rows.fresh | view.with_sources(self.leftmost(view.rows, view.now))
        return torch.where(view.observed, view.rows.everywhere, cached)

    def leftmost(self, rows: Sequences, now: Now) -> Tensor:
        """bool [B, S]: the masks that are computed and whose attention is watched."""
        needed = rows.open(now).sum(1, keepdim=True) - now.left
        return rows.masked & (rows.masked.cumsum(1) <= needed.clamp(min=self.window))
