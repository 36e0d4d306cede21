"""What can be kept of every step of a generation."""

from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.canvas import Canvas
from dkv.passes import Pass


def _history(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """int64 [B, L]: the canvas."""
    return canvas.sequences()


def _active(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """bool [B, L]: the slots that a pass computed."""
    return canvas.to_caller(torch.zeros_like(canvas.masked) if done is None else done.active.mask)


def _confidences(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """float32 [B, L]: the confidence of the slots that a pass ranked, NaN at the others."""
    batch, size = canvas.masked.shape
    wide = torch.full((batch, size + 1), torch.nan, device=canvas.tokens.device)
    if done is not None and done.confidence is not None:
        wide.scatter_(1, done.slots, done.confidence.float())
    padding = ~canvas.to_caller(torch.ones_like(canvas.masked))
    return canvas.to_caller(wide[:, :-1]).masked_fill(padding, torch.nan)


def _logits(canvas: Canvas, done: Pass | None, model: Any) -> Tensor:
    """[B, L, V]: the logits of the slots that a pass computed, 0 at the others."""
    batch, size = canvas.masked.shape
    wide = torch.zeros(batch, size + 1, model.spec.vocab_size, dtype=model.dtype, device=model.device)
    if done is not None:
        kernels.scatter_rows_(wide, done.positions, model.head(done.hidden), validate=False)
    return canvas.to_caller(wide[:, :-1])


# By its name in `DiffusionOutput`, whose setting is `output_` and the name: how it is made of the rows on the canvas,
# and what stands for a row that has left.
RECORDS = {"history": (_history, None), "active": (_active, False), "confidences": (_confidences, torch.nan),
           "logits": (_logits, 0)}  # fmt: skip
