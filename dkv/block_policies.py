"""The policies of Fast-dLLM (Wu et al. 2025): what is recomputed follows from the current block."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dkv.canvas import column
from dkv.policy import Active, Policy, View, runs_of, sources
from dkv.schedule import Step
from dkv.validation import flag


@dataclass(frozen=True)
class PrefixCache(Policy):
    """The current block and everything after it; what stands before the block is cached.

    Each block begins with a full pass, which decodes tokens, too (published code, LLaDA). In a shifted model
    the slot that predicts the first of the block is computed as well.

    Args:
        delayed: slots of the block leave the active set one step after they were decoded, as in `Decode`.
    """

    name: ClassVar[str] = "prefix"
    delayed: bool = False

    def __post_init__(self):
        flag("delayed", self.delayed)

    def full(self, step: Step, shifted: bool) -> bool:
        return step.in_block == 0

    def active(self, view: View) -> Active:
        first = view.first_slots([step.start for step in view.steps])
        after = view.canvas.everywhere & (view.slot >= column(first.tolist(), view.slot.device))
        found = Active(after, view.canvas.row_lengths - first)
        return _with_sources(view, found, view.masked_counts, np.ones_like(first), self.delayed)


@dataclass(frozen=True)
class DualCache(Policy):
    """The current block alone; what stands before and after it is cached.

    Full passes and arguments are those of `PrefixCache`.
    """

    name: ClassVar[str] = "dual"
    delayed: bool = False

    def __post_init__(self):
        flag("delayed", self.delayed)

    def full(self, step: Step, shifted: bool) -> bool:
        return step.in_block == 0

    def active(self, view: View) -> Active:
        canvas = view.canvas
        block = canvas.span(view.column(lambda step: step.start), view.column(lambda step: step.stop))
        counts = np.array([step.stop - step.start for step in view.steps])
        runs = counts
        if view.shifted:
            parts = zip(canvas.to_fill, view.steps, strict=True)
            runs = np.array([runs_of(fill[step.start : step.stop]) for fill, step in parts])
        return _with_sources(view, Active(block, counts), view.open_counts, runs, self.delayed)


def _with_sources(view: View, found: Active, masked: np.ndarray, runs: np.ndarray, delayed: bool) -> Active:
    """The slots of `found`, if `delayed` those that are masked or fresh, and in a shifted model what predicts them.

    `masked` of the slots in `found` are masked at most, and they lie in so many `runs` of neighbours.
    """
    mask, counts = found.mask, found.counts
    if delayed:
        unsettled = np.minimum(counts, masked + view.fresh_counts)
        mask, counts, runs = mask & (view.canvas.masked | view.canvas.fresh), unsettled, unsettled
    return Active(mask | sources(mask), counts + runs) if view.shifted else Active(mask, counts)
