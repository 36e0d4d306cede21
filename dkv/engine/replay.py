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
        self._batch, self._shape = list(range(len(rows.tokens))), tuple(rows.ids.shape)

    def order(self, step: Tensor) -> Tensor:
        drawn = {
            at: torch.as_tensor(self._numbers(at, self._shape), dtype=torch.float32)
            for at in set(step.flatten().tolist())
        }
        for found in drawn.values():
            if tuple(found.shape) != self._shape:
                raise ValueError(f"numbers must return {list(self._shape)} values, got {list(found.shape)}")
        chosen = torch.stack([drawn[at][row] for at, row in zip(step.flatten().tolist(), self._batch, strict=True)])
        return self._rows.from_caller(chosen.to(step.device))

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self._batch = [self._batch[row] for row in rows]


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
