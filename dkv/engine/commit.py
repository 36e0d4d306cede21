"""How many slots are filled at a time, and which."""

import math

import torch
from torch import Tensor

from dkv.engine.config import DiffusionConfig


def first_slots(score: Tensor, open_: Tensor, counts: Tensor, width: int) -> Tensor:
    """The `counts` open slots of every row with the highest score, best first, filled up with S: int64 [B, width].

    Args:
        score: [B, S]; of equal scores the first slot comes first.
        open_: bool [B, S].
        counts: int64 [B, 1], at most `width`.
    """
    size, lowest = score.shape[1], torch.finfo(score.dtype).min
    best, slots = score.clamp(min=lowest).masked_fill(~open_, -torch.inf).sort(dim=1, descending=True, stable=True)
    wanted = (best >= lowest) & (torch.arange(size, device=score.device) < counts)
    found = torch.where(wanted, slots, size)[:, :width]
    return torch.nn.functional.pad(found, (0, width - found.shape[1]), value=size)


def confident_counts(confidence: Tensor, eligible: Tensor, least: Tensor, config: DiffusionConfig) -> Tensor:
    """How many slots of every row are sure enough to be filled at once, at least `least`: int64 [B].

    With `threshold`, those whose confidence is at least that. With `factor` f, the largest n for which
    (n + 1) (1 - c) < f, c being the n-th highest confidence (Fast-dLLM, Wu et al. 2025).

    Args:
        confidence: [B, N] logarithms, or negative entropies.
        eligible: bool [B, N].
        least: int64 [B].
    """
    rule, bound, finite_only = sureness(config)
    if finite_only:
        eligible = eligible & (confidence > -torch.inf)
    known = confidence.float().clamp(min=torch.finfo(torch.float32).min)
    best = known.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True).values
    if rule == "threshold":
        sure = best >= bound
    else:
        number = torch.arange(2, best.shape[1] + 2, device=best.device)
        sure = (number * -torch.expm1(best) < bound) & (best > -torch.inf)
    return torch.maximum(sure.sum(1), least)


def sureness(config: DiffusionConfig) -> tuple[str, float, bool]:
    """The rule by which slots are sure enough, its bound, and whether a confidence of -inf never is."""
    rule, bound = "fixed", 0.0
    if config.threshold is not None:
        rule, bound = "threshold", config.threshold
        if config.confidence != "entropy":
            bound = math.log(bound) if bound > 0 else -math.inf
        bound = max(bound, torch.finfo(torch.float32).min)
    elif config.factor is not None:
        rule, bound = "factor", config.factor
    return rule, bound, config.confidence_eos_eot_inf
