"""Generations whose random orders are given, and whose steps are watched: for recorded runs and measurements."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dkv.core.sequences import Sequences
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import Ending, among
from dkv.engine.engine import OnStep
from dkv.engine.noise import Noise
from dkv.engine.output import DiffusionOutput
from dkv.engine.run import Run

# (step, (B, L)) -> numbers in [0, 1) for the columns of the caller's layout
Numbers = Callable[[int, tuple[int, int]], Tensor]


class RecordedNoise(Noise):
    """The noise of a generation whose random orders are given; its tokens are not drawn, or from seed 0.

    Args:
        numbers: asked for every one of the `steps` at once.
        rows: as for `Noise`.
    """

    def __init__(self, numbers: Numbers, rows: Sequences, steps: int):
        super().__init__([0] * len(rows.tokens), rows)
        shape, orders = tuple(rows.ids.shape), []
        for at in range(steps):
            found = torch.as_tensor(numbers(at, shape), dtype=torch.float32)
            if tuple(found.shape) != shape:
                raise ValueError(f"numbers must return {list(shape)} values, got {list(found.shape)}")
            orders.append(rows.from_caller(found.to(rows.tokens.device)))
        self._orders = torch.stack(orders, 1)  # [B, steps, S]

    def order(self, step: Tensor) -> Tensor:
        at = step[..., None].expand(-1, -1, self._orders.shape[2])
        return self._orders.gather(1, at).squeeze(1)


class BlockEnd(Ending):
    """Ends a row as the published code of Streaming-dLLM does: where a block is full and holds an end token anywhere,
    all slots behind that block become padding."""

    asked = True

    def __init__(self, eos: int, device: torch.device):
        super().__init__([eos], None, 0, device)

    def ends(self, rows: Sequences, numbers: Sequence[int]) -> Tensor:
        # The blocks before the current one are full.
        start = rows.timetable.now().start
        found = among(rows.tokens[:, :-1], self.eos) & (rows.rank >= 0) & (rows.rank < start)
        behind = (rows.rank == start).int().argmax(1, keepdim=True)
        return torch.where(found.any(1, keepdim=True), behind, rows.size + 1)


@torch.no_grad()
def replay(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    numbers: Numbers | None = None,
    on_step: OnStep | None = None,
    ending: Ending | None = None,
    **settings: Any,
) -> DiffusionOutput:
    """`dkv.generate`, with random orders from `numbers` if they are given, and with another `ending` than that of the
    settings; `on_step` is called after each step."""
    config = DiffusionConfig(**settings)

    def recorded(rows: Sequences) -> Noise:
        plans = [config.plan(model.spec.shifted, row, count) for row, count in enumerate(rows.to_fill)]
        return RecordedNoise(numbers, rows, max(1, *map(len, plans)))

    noise = None if numbers is None else recorded
    ids, run = Run.after_prompts(model, input_ids, attention_mask, config, noise=noise, ending=ending, on_step=on_step)
    return run.to_the_end(None, ids, new=ids.shape[1])
