"""The commit of a step, eager, one entry after the other: what is right."""

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide


def ranked(log_confidence: Tensor) -> Tensor:
    """Confidences as they are compared: half precision in float32, NaN as the lowest."""
    x = wide(log_confidence)
    return x.masked_fill(x.isnan(), -torch.inf)


def commit_(canvas, token, log_confidence, eligible, count, positions: Tensor | None) -> Tensor:
    if positions is None:
        positions = torch.arange(canvas.shape[1], device=canvas.device).expand_as(canvas)
    confidence = ranked(log_confidence)
    committed = torch.zeros_like(eligible)
    for b in range(len(canvas)):
        entries = [i for i in range(eligible.shape[1]) if eligible[b, i]]
        entries.sort(key=lambda i: (-float(confidence[b, i]), int(positions[b, i])))
        for i in entries[: max(int(count[b]), 0)]:
            canvas[b, positions[b, i]] = token[b, i]
            committed[b, i] = True
    return committed
