"""How many slots are filled at a time, and which, where that has to be known before the pass."""

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.sequences import Sequences, mask_of
from dkv.engine.config import DiffusionConfig
from dkv.engine.rules import sureness
from dkv.kernels.commit.reference import ENTROPY_RULES, Rules
from dkv.kernels.commit.together import beside, best_first, bounded, finite


def first_slots(score: Tensor, open_: Tensor, counts: Tensor, width: int) -> Tensor:
    """The `counts` open slots of every row with the highest score, best first, filled up with S: int64 [B, width].

    Args:
        score: [B, S]; of equal scores the first slot comes first.
        open_: bool [B, S].
        counts: int64 [B, 1], at most `width`.
    """
    size, (best, slots) = score.shape[1], best_first(score, open_)
    wanted = (best > -torch.inf) & (torch.arange(size, device=score.device) < counts)
    found = torch.where(wanted, slots, size)[:, :width]
    return torch.nn.functional.pad(found, (0, width - found.shape[1]), value=size)


def confident_slots(
    score: Tensor,
    confidence: Tensor,
    entropy: Tensor | None,
    open_: Tensor,
    least: Tensor,
    rules: Rules,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a rule of confidence fills at once: slots, bool [B, S], and how many of them, best first, int64 [B, 1].

    Args:
        score: [B, S], what slots are ranked by.
        confidence: [B, S] logarithms, or negative entropies.
        entropy: [B, S] in nats, for the rules that go by it.
        open_: bool [B, S].
        least: int64 [B, 1], how many are filled at least.
        rules: see there.
        bounds: float32 [B] in place of the bound of a threshold.
    """
    bound = rules.bound if bounds is None else bounds[:, None]
    may = open_ & (confidence > -torch.inf) if rules.finite_only else open_
    if rules.rule == "near":
        surest = mask_of(first_slots(score, open_, least, open_.shape[1]), open_)
        chosen = surest | beside(confidence, may, bound, rules)
        return chosen, chosen.sum(1, keepdim=True)
    if rules.rule in ENTROPY_RULES:
        return open_, torch.maximum(bounded(score, entropy, may, rules).unsqueeze(1), least)
    found = _confident(confidence, may, bound, rules)
    return open_, torch.maximum(found.unsqueeze(1), least)


def _confident(confidence: Tensor, may: Tensor, bound: Tensor | float, rules: Rules) -> Tensor:
    """How many slots of every row fulfil "threshold" or "factor", int64 [B]."""
    known = confidence.float()
    if rules.rule == "threshold":
        return ((finite(known) >= bound) & may).sum(1)
    best, _ = best_first(known, may)
    number = torch.arange(2, best.shape[1] + 2, device=best.device)
    return ((number * -torch.expm1(best) < rules.bound) & (best > -torch.inf)).sum(1)


def bounds_of_rows(config: DiffusionConfig, rows: Sequences, now: Now, seen: Tensor | None) -> Tensor | None:
    """The bound of every row for this step where the threshold falls with its masks: float32 [B]; None: it does not.

    With r the share of masks among the slots to fill that are seen from the first of the block on, the threshold is
    multiplied by 1 - threshold_decay (1 - r), but not in the first step of a block (Streaming-dLLM, published code).
    Bounds are logarithms; so a negative entropy, whose exponential is taken for a probability, is treated alike.

    Args:
        seen: bool [B, S], slots that the pass may see; None: all.
    """
    if not config.threshold_decay:
        return None
    ahead = rows.rank >= now.start
    if seen is not None:
        ahead &= seen
    share = (ahead & rows.masked).sum(1).float() / ahead.sum(1).clamp(min=1)
    kept = (1 - config.threshold_decay * (1 - share)).masked_fill(now.in_block.squeeze(1) == 0, 1)
    # Where nothing is left of it, the log is -inf, and the lowest number is met by all.
    return (sureness(config).bound + kept.log()).clamp(min=torch.finfo(torch.float32).min)
