"""Generations whose random orders are given, and whose steps are watched: for recorded runs and measurements."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.engine import OnStep
from dkv.engine.noise import Noise
from dkv.engine.output import DiffusionOutput
from dkv.engine.run import Run

# (step, (B, L)) -> numbers in [0, 1) for the columns of the caller's layout
Numbers = Callable[[int, tuple[int, int]], Tensor]


class RecordedNoise(Noise):
    """The noise of a generation whose random orders are given; its tokens are not drawn, or from seed 0."""

    def __init__(self, numbers: Numbers, rows: Sequences):
        super().__init__([0] * len(rows.tokens), rows)
        self._numbers, self._rows = numbers, rows
        self._table: Tensor | None = None

    def order(self, step: Tensor) -> Tensor:
        if self._table is None:
            self._table = torch.stack([self._of_step(at) for at in range(self._rows.timetable.longest)], 1)
        at = step[..., None].expand(-1, -1, self._table.shape[2])
        return self._table.gather(1, at).squeeze(1)

    def _of_step(self, at: int) -> Tensor:
        shape = tuple(self._rows.ids.shape)
        found = torch.as_tensor(self._numbers(at, shape), dtype=torch.float32)
        if tuple(found.shape) != shape:
            raise ValueError(f"numbers must return {list(shape)} values, got {list(found.shape)}")
        return self._rows.from_caller(found.to(self._rows.tokens.device))

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self._table = None if self._table is None else self._table[rows]


@torch.no_grad()
def replay(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    numbers: Numbers | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> DiffusionOutput:
    """`dkv.generate`, with random orders from `numbers` if they are given; `on_step` is called after each step."""
    noise = None if numbers is None else partial(RecordedNoise, numbers)
    config = DiffusionConfig(**settings)
    ids, run = Run.after_prompts(model, input_ids, attention_mask, config, noise=noise, on_step=on_step)
    return run.to_the_end(None, ids, new=ids.shape[1])
