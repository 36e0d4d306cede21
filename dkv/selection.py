"""How many slots are filled at a time, and which."""

import numpy as np
import torch
from torch import Tensor

from dkv.canvas import column
from dkv.config import DiffusionConfig


def plan_slots(score: Tensor, open_: Tensor, counts: np.ndarray) -> Tensor:
    """The `counts` open slots of every row with the highest score, best first, filled up with S: int64 [B, n].

    Args:
        score: [B, S]; of equal scores the first slot comes first.
        open_: bool [B, S].
        counts: int64 [B], known to the host.
    """
    size, width = score.shape[1], int(counts.max())
    lowest = torch.finfo(score.dtype).min
    best, slots = score.clamp(min=lowest).masked_fill(~open_, -torch.inf).sort(dim=1, descending=True, stable=True)
    wanted = best[:, :width] >= lowest
    if (counts != width).any():
        wanted &= torch.arange(wanted.shape[1], device=score.device) < column(counts.tolist(), score.device)
    return torch.where(wanted, slots[:, :width], size)


def confident_counts(confidence: Tensor, eligible: Tensor, least: Tensor, config: DiffusionConfig) -> Tensor:
    """How many slots of every row are sure enough to be filled at once, at least `least`: int64 [B].

    With `threshold`, those whose confidence is at least that. With `factor` f, the largest n for which
    (n + 1) (1 - c) < f, c being the n-th highest confidence (Fast-dLLM, Wu et al. 2025).

    Args:
        confidence: [B, N] logarithms, or negative entropies.
        eligible: bool [B, N].
        least: int64 [B].
    """
    logarithm = config.confidence != "entropy"
    if config.confidence_eos_eot_inf:
        eligible = eligible & (confidence > -torch.inf)
    known = confidence.float().clamp(min=torch.finfo(torch.float32).min)
    best = known.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True).values
    if config.threshold is not None:
        value = torch.tensor(float(config.threshold), dtype=torch.float64)
        sure = best >= max((value.log() if logarithm else value).item(), torch.finfo(torch.float32).min)
    else:
        number = torch.arange(2, best.shape[1] + 2, device=best.device)
        sure = (number * -torch.expm1(best) < config.factor) & (best > -torch.inf)
    return torch.maximum(sure.sum(1), least)
