"""What can be kept of every step of a generation."""

from typing import Any

import torch
from torch import Tensor

from dkv.core.sequences import outside
from dkv.engine.engine import Engine, StepResult


def visible(engine: Engine, result: StepResult) -> Tensor:
    """bool [B, L]: the slots that a step may compute and see."""
    rows, gaps = engine.rows, result.plan.hidden
    return rows.to_caller(rows.everywhere if gaps is None else rows.everywhere & outside(gaps, rows.size))


def entering(engine: Engine, result: StepResult) -> Tensor:
    """bool [layers + 1, B, L]: the slots that enter each layer of a pass, and those that have gone through all."""
    found, now, narrow = [], result.plan.active, result.forward and result.forward.narrow
    for layer in range(engine.model.spec.num_layers + 1):
        found.append(engine.rows.to_caller(now))
        if narrow and layer in narrow.layers:
            rows, slots = narrow.stages[narrow.layers.index(layer)]
            wide = now.new_zeros(now.shape[0], now.shape[1] + 1)
            wide[rows, slots] = True
            now = wide[:, :-1]
    return torch.stack(found)


def _active(engine: Engine, result: StepResult) -> Tensor:
    """bool [B, L]: the slots that a pass computed."""
    return engine.rows.to_caller(result.plan.active)


def _confidences(engine: Engine, result: StepResult) -> Tensor:
    """float32 [B, L]: the confidence of the slots that a pass ranked, NaN at the others."""
    rows, choice = engine.rows, result.choice
    batch, size = rows.masked.shape
    wide = torch.full((batch, size + 1), torch.nan, device=rows.tokens.device)
    if choice is not None:
        packed = result.forward.packed
        wide[packed.scored_rows, packed.slots] = choice.confidence.float()
    # The last column took what fills the entries up.
    padding = ~rows.to_caller(torch.ones_like(rows.masked))
    return rows.to_caller(wide[:, :-1]).masked_fill(padding, torch.nan)


def _logits(engine: Engine, result: StepResult) -> Tensor:
    """[B, L, V]: the logits of the slots that a pass computed, 0 at the others."""
    model, forward = engine.model, result.forward
    batch, size = engine.rows.masked.shape
    wide = torch.zeros(batch, size + 1, model.spec.vocab_size, dtype=model.dtype, device=model.device)
    if forward is not None:
        wide[forward.packed.rows, forward.packed.positions] = model.head(forward.hidden)
    return engine.rows.to_caller(wide[:, :-1])


# By its name in `DiffusionOutput`, whose setting is `output_` and the name.
RECORDS = {
    "history": lambda engine, result: engine.sequences,
    "active": _active,
    "confidences": _confidences,
    "logits": _logits,
}


class Recorder:
    """Keeps what a configuration asks for, step by step; it is a hook of the engine."""

    def __init__(self, config: Any):
        self.kept: dict[str, list[Tensor]] = {name: [] for name in RECORDS if getattr(config, f"output_{name}")}

    def __bool__(self) -> bool:
        return bool(self.kept)

    def __call__(self, engine: Engine, result: StepResult) -> None:
        for name, records in self.kept.items():
            records.append(RECORDS[name](engine, result))

    def fields(self) -> dict[str, Any]:
        """The records as fields of `DiffusionOutput`."""
        # The logits of all steps together would be twice as large while they are stacked.
        return {name: tuple(of) if name == "logits" else torch.stack(of) for name, of in self.kept.items() if of}
