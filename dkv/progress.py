"""Where every row stands in its own schedule, known to the host."""

from collections.abc import Sequence

import numpy as np

from dkv.schedule import Step


class Progress:
    """The next step of every row, and how many of its slots are masked, open and fresh.

    With a fixed schedule the counts follow from it, and nothing is read back from the device.

    Args:
        plans: by row, its steps (`DiffusionConfig.plan`).
        to_fill: by row, how many slots it fills.

    Attributes:
        masked: int64 [B], slots without a token.
        open: those of the current block.
        fresh: slots that the last step filled.
    """

    def __init__(self, plans: Sequence[list[Step]], to_fill: Sequence[int]):
        self._plans, self._at = list(plans), [0] * len(plans)
        self.masked = np.array(to_fill, dtype=np.int64)
        self.open, self.fresh = np.zeros_like(self.masked), np.zeros_like(self.masked)

    @property
    def steps(self) -> list[Step]:
        """By row, the step that comes next."""
        return [plan[at] for plan, at in zip(self._plans, self._at, strict=True)]

    def begin(self) -> list[Step]:
        """The steps that come next; in the first of a block, its slots become open."""
        steps = self.steps
        for row, step in enumerate(steps):
            if step.in_block == 0:
                self.open[row] = step.stop - step.start
        return steps

    def quota(self, dynamic: bool) -> np.ndarray:
        """int64 [B], slots to fill now: as planned, or if `dynamic` the least that keeps up with the plan."""
        behind = self.open - np.array([step.left for step in self.steps])
        return np.maximum(behind, 1) if dynamic else behind

    def advance(self, filled: np.ndarray) -> None:
        """Go to the next steps after this many slots were filled; to the next block where none is open."""
        self.masked, self.open, self.fresh = self.masked - filled, self.open - filled, filled
        for row, plan in enumerate(self._plans):
            at = self._at[row]
            block, at = plan[at].block, at + 1
            while self.open[row] == 0 and at < len(plan) and plan[at].block == block:
                at += 1
            self._at[row] = at

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self._plans, self._at = [self._plans[row] for row in rows], [self._at[row] for row in rows]
        self.masked, self.open, self.fresh = self.masked[rows], self.open[rows], self.fresh[rows]
