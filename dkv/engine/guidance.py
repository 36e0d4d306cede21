"""Classifier-free guidance (LLaDA, Nie et al. 2025, appendix): every row in two branches, with its text and without."""

import torch
from torch import Tensor

from dkv.core.sequences import Sequences


def twice(x: Tensor | None) -> Tensor | None:
    """[B, ...] -> [2 B, ...]: each row and its copy, one after the other."""
    return None if x is None else x.repeat_interleave(2, 0)


def with_and_without_text(tokens: Tensor, positions: Tensor, rows: Sequences, mask_id: int) -> Tensor:
    """Ids [B, N] at `positions` -> [2 B, N]: as they are, and with the mask at all that was given."""
    given = rows.rank.gather(1, positions.clamp(max=rows.size - 1)) < 0
    return torch.stack((tokens, tokens.masked_fill(given, mask_id)), 1).flatten(0, 1)


def guided(hidden: Tensor, scale: float) -> Tensor:
    """Hidden states [2 B, R, d] of both branches -> [B, R, d], whose logits are l + scale (l - l').

    What is done to hidden states is done to logits, as the head is linear: no second set of logits is made.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).unflatten(0, (-1, 2))
    with_, without = wide.unbind(1)
    return (without + (with_ - without) * (1 + scale)).to(hidden.dtype)
