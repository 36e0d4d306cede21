"""Certainty density: how much of what stands around a slot is known."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.core.sequences import Sequences

# What sigma may be. Below this a neighbour would hardly count.
SIGMAS = 0.25, 1000
# Slots of a tile: those of one tile are a product of what stands near it with one matrix.
TILE = 64


class Density:
    """The share of known slots around every slot, nearer ones counting more (d2Cache, arXiv 2509.23094).

    D_j = sum over slots i of known_i w(i - j) / Z with w(d) = exp(-d^2 / (2 sigma^2)), over the answer of a row: all
    from its first slot to fill to its last, A of them. As many slots before it count as known, and as many after it
    once its last slot is. Z is the sum of w(d) for d from -3A to 3A - 1 (published code). In infilling (ours) given
    text within the answer is known, and so are the A slots after it if text stands there: distances are those in the
    text, not those among the slots to fill.

    Weights are multiples of a power of two, and so few that float64 adds them without rounding: a sum does not depend
    on its order, so a row has the same densities alone and beside longer rows. Where all that is known is so far away
    that no weight is left (beyond 8 sigma or so), the density is 0.

    Args:
        sigma: in slots.
        rows: whose slots to fill stay where they are; at least one slot.
    """

    def __init__(self, sigma: float, rows: Sequences):
        slot = torch.arange(rows.size, device=rows.rank.device)
        to_fill = rows.rank >= 0
        first = to_fill.int().argmax(1, keepdim=True)
        self._last = rows.size - 1 - to_fill.flip(1).int().argmax(1, keepdim=True)
        self._answer = (slot >= first) & (slot <= self._last)
        weights = _weights(sigma).to(slot.device)
        # Of distances 0 to d, at d + 1.
        sums = F.pad(weights.cumsum(0), (1, 0))

        def upto(distance: Tensor) -> Tensor:
            return sums[(distance + 1).clamp(0, len(weights))]

        length, place = self._last - first + 1, slot - first
        before = upto(place + length) - upto(place)
        after = upto(2 * length - 1 - place) - upto(length - 1 - place)
        goes_on = self._last < rows.lengths - 1
        self._before, self._after = before + after * goes_on, after * ~goes_on
        self._whole = upto(3 * length) - weights[0] + upto(3 * length - 1)
        reach = min(len(weights), rows.size) - 1
        near, column = (torch.arange(n, device=slot.device) for n in (TILE + 2 * reach, TILE))
        apart = (near[:, None] - reach - column).abs()
        self._near = F.pad(weights, (0, 1))[apart.clamp(max=len(weights))]

    def __call__(self, masked: Tensor) -> Tensor:
        """float64 [B, S], right within the answers, where the slots `masked` [B, S] are those not known."""
        known = (self._answer & ~masked).double()
        width, size = self._near.shape[0], known.shape[1]
        reach = (width - TILE) // 2
        wide = F.pad(known, (reach, -size % TILE + reach)).unfold(1, width, TILE)
        around = (wide @ self._near).flatten(1)[:, :size]
        return (around + self._before + self._after * known.gather(1, self._last)) / self._whole


def _weights(sigma: float) -> Tensor:
    """The weights of the distances 0, 1, ... that are not 0, float64."""
    # All of them, on both sides, add up to less than this; 52 bits hold the sum.
    bits = 52 - math.ceil(math.log2(2.6 * sigma + 1))
    reach = math.ceil(sigma * math.sqrt(2 * math.log(2) * (bits + 1)))
    weights = torch.exp(-(torch.arange(reach + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    weights = torch.round(weights * 2**bits) / 2**bits
    return weights[weights > 0]
