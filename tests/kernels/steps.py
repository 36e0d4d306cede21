"""Random states of rows in the middle of a generation, and passes over them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dkv import kernels
from dkv.kernels.commit.reference import Chosen, Pass, State
from dkv.kernels.plan.reference import FIELDS

LEVELS = torch.tensor([-torch.inf, -2.0, -0.7, -0.3, -0.1, -1e-4, 0.0])
# By rule of the commit, the bounds of it that some of the slots fulfil.
HOW = {
    "fixed": {},
    "threshold": {"bound": -0.3},
    "factor": {"bound": 1.3},
    "entropy_sum": {"bound": 1.3},
    "entropy": {"bound": 1.3},
    "near": {"bound": -0.1, "near": -0.7, "radius": 2},
}


@dataclass
class Rows:
    """Rows [B, S] whose last slots may be missing, filled in blocks; some of them are finished.

    Attributes:
        table: int64 [B, L, 7].
        other: the fields of the state, of all but its `rank`.
    """

    lengths: Tensor
    table: Tensor
    state: State

    @classmethod
    def random(cls, batch: int, slots: int, *, vocabulary: int = 9, finished: bool = True) -> "Rows":
        lengths = torch.randint((slots + 1) // 2, slots + 1, (batch,))
        inside = torch.arange(slots) < lengths[:, None]
        to_fill = inside & (torch.rand(batch, slots) < 0.7)
        rank = torch.where(to_fill, to_fill.cumsum(1) - 1, -1)
        masked = to_fill & (torch.rand(batch, slots) < 0.6)
        if finished and batch > 1:
            masked[torch.randint(batch, ())] = False
        steps = 5
        table = torch.randint(0, steps + 3, (batch, steps, len(FIELDS)))
        table[..., FIELDS.index("index")] = torch.arange(steps)
        start = torch.randint(0, slots // 2 + 1, (batch, steps))
        table[..., FIELDS.index("start")] = start
        table[..., FIELDS.index("stop")] = start + torch.randint(1, slots + 2, (batch, steps))
        table[..., FIELDS.index("left")] = torch.randint(0, slots // 2 + 1, (batch, steps))
        table[..., FIELDS.index("full")] = torch.randint(0, 2, (batch, steps))
        at = torch.randint(steps, (batch,))
        # As masks are kept in a generation: the last column of a wider tensor is left out.
        wide = torch.zeros(batch, slots + 1, dtype=torch.bool)
        wide[:, :-1] = masked
        state = State(
            torch.randint(vocabulary, (batch, slots + 1)),
            wide[:, :-1],
            torch.rand(batch, slots) < 0.3,
            torch.rand(batch, slots) < 0.5,
            rank,
            at,
            table[torch.arange(batch), at],
            torch.randint(3, (batch,)),
            torch.zeros(batch, dtype=torch.bool),
        )
        return cls(lengths, table, state)

    def plan(self, kind: str = "open", everything: bool = False, **how: bool) -> tuple:
        """Arguments of `plan_pass`, positional ones and others."""
        state, shape = self.state, self.state.masked.shape
        inside = torch.arange(shape[1]) < self.lengths[:, None]
        others = {"cut": state.cut, "invalid": state.invalid, "kind": kind, **how}
        if kind in ("window", "chosen"):
            block = (state.rank >= state.now[:, 2:3]) & (state.rank < state.now[:, 3:4])
            others["chosen"] = state.masked & block & (torch.rand(shape) < 0.5)
        if everything:
            others["everything"] = inside & (torch.rand(shape) < 0.8)
        return (state.now, state.masked, state.rank, self.lengths, inside & (torch.rand(shape) < 0.7)), others

    def passed(
        self, kind: str = "open", *, filling: int = 0, dtype: torch.dtype = torch.float32, by_row=False, **how: bool
    ):
        """A pass, with as many entries as are scored and `filling` more, and what was chosen for them.

        With `by_row` every row has a bound of its own.
        """
        given, others = self.plan(kind, **how)
        active, scored, eligible, count, report = kernels.plan_pass(*given, **others)
        count = torch.randint(-1, self.state.masked.shape[1], count.shape)
        entries = int(report[1].sum()) + filling
        confidence = LEVELS[torch.randint(len(LEVELS), (entries,))].to(dtype)
        score = torch.where(torch.rand(entries) < 0.5, confidence, confidence - torch.rand(entries).to(dtype))
        starts = report[1].cumsum(0) - report[1]
        # Some are nothing, and some so small that they are lost beside others.
        entropy = torch.rand(entries) * torch.tensor([0.0, 1e-12, 1e-6, 0.3, 2.0])[torch.randint(5, (entries,))]
        chosen = Chosen(torch.randint(20, 30, (entries,)), confidence, score, entropy)
        bound = LEVELS[torch.randint(len(LEVELS), count.shape)] if by_row else None
        return Pass(active, scored, eligible, count, starts, bound), chosen

    def copy(self) -> State:
        """The state in memory of its own, with the same strides."""
        return State(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in self.state))
