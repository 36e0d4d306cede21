"""The commit of a step in fast PyTorch, without reading a value back to the host."""

import torch

from dkv.kernels.commit.reference import ranked


def commit_(canvas, token, log_confidence, eligible, count, positions):
    confidence = ranked(log_confidence)
    # Clamped, so that an eligible slot of confidence -inf still comes before one that is not eligible.
    score = confidence.clamp(min=torch.finfo(confidence.dtype).min).masked_fill(~eligible, -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(order.shape[1], device=order.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    committed = (rank < count[:, None]) & eligible
    if positions is None:
        canvas.copy_(torch.where(committed, token, canvas))
    else:
        # Added, as an entry that is not committed may name the slot of one that is.
        canvas.scatter_add_(1, positions, (token - canvas.gather(1, positions)).masked_fill_(~committed, 0))
    return committed
