"""Rules by which several slots of a row are filled together, on rows [B, S] in PyTorch; nothing is read back."""

import torch
from torch import Tensor

from dkv.kernels.commit.reference import UNIT, Rules, units
from dkv.kernels.common.dtypes import wide


def finite(x: Tensor) -> Tensor:
    """A copy in which NaN and -inf are the lowest finite number: what may be filled comes before what may not."""
    x = wide(x)
    lowest = torch.finfo(x.dtype).min
    return x.nan_to_num(lowest, torch.inf, lowest)


def best_first(score: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of every row by falling score [B, S], equal ones from the left: their scores, -inf where a slot is not
    `among` bool [B, S], and the slots, int64 [B, S]. A score of -inf or NaN comes last of those that are."""
    return finite(score).masked_fill_(~among, -torch.inf).sort(dim=1, descending=True, stable=True)


def bounded(score: Tensor, entropy: Tensor, may: Tensor, rules: Rules) -> Tensor:
    """How many slots of each row fulfil "entropy" or "entropy_sum": int64 [B].

    Args:
        score, entropy: [B, S], what slots are ordered by, and nats.
        may: bool [B, S], slots that count.
    """
    order = best_first(score, may)[1]
    own = units(entropy).masked_fill_(~may, 0).gather(1, order)
    spared = own.cummax(1).values if rules.rule == "entropy" else own
    spent = (own.cumsum(1) - spared).float() * UNIT
    return ((spent <= rules.bound) & may.gather(1, order)).sum(1)


def beside(confidence: Tensor, may: Tensor, bound: Tensor | float, rules: Rules) -> Tensor:
    """The slots that fulfil "near": bool [B, S].

    Args:
        confidence: [B, S].
        may: bool [B, S], slots that count.
        bound: of each row, [B, 1], or of all.
    """
    known, size = finite(confidence.float()), may.shape[1]
    anchors = may & (known >= bound)
    # Anchors before each slot; two of these numbers differ where an anchor stands between them.
    before = torch.nn.functional.pad(anchors.cumsum(1), (1, 0))
    slot = torch.arange(size, device=may.device)
    first, last = (slot - rules.radius).clamp(min=0), (slot + rules.radius + 1).clamp(max=size)
    reached = before.index_select(1, last) > before.index_select(1, first)
    return anchors | (reached & may & (known >= rules.near))
