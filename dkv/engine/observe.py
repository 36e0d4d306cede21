"""What a pass tells beside its logits: how much attention every slot gets, through all layers."""

import torch
from torch import Tensor

from dkv import kernels
from dkv.core.kv_cache import KVCache
from dkv.core.sequences import Sequences
from dkv.engine.stages import Packed
from dkv.kernels.attention.shares import Shares
from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.stored import Stored
from dkv.kernels.mass.op import MASS
from dkv.parallel import Ranks


class Observer:
    """Keeps what was asked in a pass, layer by layer; the argument `observe` of `Transformer.step`.

    With guidance the branch that has the text is observed, and not the one without.

    Args:
        packed: the entries, of one branch.
        rows: whose they are.
        cache: their keys.
        ranks: the processes that have heads of the model; None: all are here.

    Attributes:
        layers: of each its number, its queries [T, Hq, D], the log-sum-exp of their scores [T, Hq], and what attention
            left instead of that.
    """

    def __init__(
        self, packed: Packed, rows: Sequences, cache: KVCache, workspace: kernels.Workspace, ranks: Ranks | None = None
    ):
        self.packed, self.rows, self.cache, self.workspace, self.ranks = packed, rows, cache, workspace, ranks
        self.layers: list[tuple[int, Tensor, Tensor | None, Shares]] = []
        # Where the entries stand among all slots [B, S + 1], of which the last is a spare.
        self._places = packed.rows * (rows.size + 1) + packed.positions

    def __call__(self, layer: int, query: Tensor, lse: Tensor | None, shares: Shares) -> None:
        total = len(self.packed.tokens)
        self.layers.append((layer, query[:total], lse if lse is None else lse[:total], shares))

    def rollout(self) -> Tensor:
        """The column sums of the attention rollout of the pass, float64 [B, S].

        The rollout is the product of all layers, a layer being the mean of the unit matrix and of its attention, itself
        the mean over the heads; a slot that was not computed attends to itself alone (Abnar and Zuidema 2020; d2Cache).
        Only the sums of its columns are made, backwards: from the last layer to the first, half of what a slot has
        stays there, and the other half goes to where it attends.
        """
        mass = torch.ones(len(self.rows.masked), self.rows.size + 1, dtype=torch.float64, device=self._places.device)
        for number in reversed(range(len(self.layers))):
            half = mass.take(self._places).div_(2)
            # What fills the entries up has the spare slot, and means nothing.
            mass.put_(self._places, half)
            mass[:, :-1] += self.attended(number, half)
        return mass[:, :-1]

    def attended(self, number: int, weight: Tensor) -> Tensor:
        """What every slot gets of the weights [T] of the queries in a layer, [B, S]."""
        layer, query, lse, shares = self.layers[number]
        segments, ranges = self.packed.active, self.rows.key_ranges
        weight = weight.to(torch.promote_types(query.dtype, torch.float32))
        scale, where = query.shape[-1] ** -0.5, (segments.starts, segments.lengths, ranges, segments.most)
        keys, how = self.keys(layer), {"workspace": self.workspace, "shares": shares}
        return self._of_all(MASS(query, keys, lse, weight, *where, scale, **how))

    def given(self, number: int, slots: Tensor) -> Tensor:
        """What every query gives in a layer to `slots` [W, B] of its row, the mean of the heads: [W, T]."""
        layer, query, lse, shares = self.layers[number]
        if shares.rows is not None:
            return self._of_all(shares.given(slots, query))
        keys = self.keys(layer)
        own = keys.at((torch.arange(slots.shape[1], device=slots.device), slots)).wide(query)
        own = own.index_select(1, self.packed.rows)
        score = (wide(query).unflatten(1, (own.shape[2], -1)) * own.unsqueeze(3)).sum(-1).flatten(2)
        return self._of_all(torch.exp(score * query.shape[-1] ** -0.5 - lse).mean(2))

    def _of_all(self, mean: Tensor) -> Tensor:
        """The mean of all heads from that of those here."""
        return mean if self.ranks is None else self.ranks.mean(mean)

    def keys(self, layer: int) -> Stored:
        """Those of the slots of all rows, [B, S, Hkv, D]."""
        return self.cache.visible(layer)[0].at(slice(len(self.rows.masked)))

    def of_entries(self, x: Tensor) -> Tensor:
        """Values [B, S] of the slots as values [T] of the entries; 0 where they are filled up."""
        return torch.nn.functional.pad(x, (0, 1)).take(self._places)

    def to_slots(self, x: Tensor) -> Tensor:
        """Values [..., T] of the entries as values [..., B, S] of their slots; 0 at those that were not computed."""
        shape = *x.shape[:-1], len(self.rows.masked), self.rows.size + 1
        return x.new_zeros(shape).flatten(-2).index_copy_(-1, self._places, x).view(shape)[..., :-1]
