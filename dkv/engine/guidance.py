"""Classifier-free guidance (LLaDA, Nie et al. 2025, appendix): every row in two branches, with its text and without."""

from dataclasses import replace

import torch
from torch import Tensor

from dkv.core.sequences import Sequences
from dkv.engine.stages import Packed


def in_both_branches(packed: Packed, rows: Sequences, mask_id: int) -> Packed:
    """The entries as they are, and once more with the mask at all that was given, as further rows of the K/V cache."""
    given = rows.rank[packed.rows, packed.positions.clamp(max=rows.size - 1)] < 0
    batch, total = len(rows.tokens), len(packed.tokens)
    return replace(
        packed,
        tokens=torch.cat((packed.tokens, packed.tokens.masked_fill(given, mask_id))),
        positions=packed.positions.repeat(2),
        rows=torch.cat((packed.rows, packed.rows + batch)),
        places=torch.cat((packed.places, packed.places + total)),
        active=packed.active.twice(total),
        scored=packed.scored.twice(len(packed.slots)),
    )


def guided(hidden: Tensor, scale: float) -> Tensor:
    """Hidden states [2 R, d] of both branches -> [R, d], whose logits are l + scale (l - l').

    What is done to hidden states is done to logits, as the head is linear: no second set of logits is made.
    """
    with_, without = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).chunk(2)
    return (without + (with_ - without) * (1 + scale)).to(hidden.dtype)
