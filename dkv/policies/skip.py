"""Early skipping inside the network (ES-dLLM, ICLR 2026): most slots stop after a few layers."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.validation import number, plain, whole
from dkv.policies.base import Cut, Policy, View, sources

# What is added to the score of the surest two masks, and of slots that the last pass filled (published code).
SUREST, FILLED = 2.0, 3.0
# A change of no more than so many units of rounding is none: slots with none are alike, and the first of them go on,
# whatever the last bits are that other company, or another device, gives them.
NO_CHANGE = 64


@dataclass(frozen=True)
class SkipCache(Policy):
    """The current block, of which only the slots that changed most or are about to be filled go through all layers.

    After a layer at which the share falls, the slots go on that have the highest score: `alpha` times the confidence
    that they last had, and 1 - `alpha` times how far their hidden state is from the one that was kept when they last
    went on. What is about to be filled always goes on: the leftmost masks of the block, as many as the step fills at
    least; and, as a rule, the two surest masks and what the last pass filled. A change within rounding counts as none,
    and among slots that are alike the first go on (in the published code any). A slot that stops keeps the keys and
    values that it had in the layers after it. In the first pass of a later block what was filled last is computed once
    more. A slot counts as reached by the slot that predicts it, in a shifted model the one before it.

    Passes are counted as if every block took as many as it has slots (published code), so what is refreshed when
    does not depend on how many slots a pass fills. In an infilled text the slots of a block are those to fill, as in
    `DualCache`; a refresh of the prompt computes all that stands before the end of the block.

    Args:
        shares: "share@depth" joined by "+": from this depth of the network on, a part of its layers, this share of the
            slots goes on; or pairs (share, depth). Both in 0..1, depths rising, shares falling.
        alpha: weight of the confidence, against that of the change of hidden states, in 0..1.
        block_every: every so many passes nothing stops; 0 or None: only where the prompt is refreshed.
        prompt_every: every so many passes nothing stops, and all slots up to the end of the block are computed; 0 or
            None: in the first pass alone, which computes what is beyond the block as well.
    """

    name: ClassVar[str] = "skip"
    by_confidence: ClassVar[bool] = True
    slides: ClassVar[bool | None] = False
    shares: str = "1/2@1/8+1/4@1/4"
    alpha: float = 0.5
    block_every: int | None = 8
    prompt_every: int | None = 64

    def __post_init__(self):
        object.__setattr__(self, "shares", _text(self.shares))
        self._take(number, "alpha", 0, 1)
        self._take(whole, "block_every", 0, optional=True)
        self._take(whole, "prompt_every", 0, optional=True)

    def cuts(self, layers: int) -> list[Cut]:
        steps, found, share = [(1.0, 0.0), *_pairs(self.shares)], [], 1.0
        for layer in range(layers):
            here = [own for own, depth in steps if layer >= depth * layers][-1]
            if here != share:
                found.append(Cut(layer, here))
            share = here
        return found

    def full(self, now: Now, shifted: bool) -> Tensor:
        return now.index == 0

    def active(self, view: View) -> Tensor:
        rows, now = view.rows, view.now
        inside = rows.rank < now.stop
        own = inside & (rows.rank >= 0)
        # What was filled last is of the block, or in its first pass of the one before.
        block = own & (rows.rank >= torch.where(rows.fresh, rows.rank, now.start).amin(1, keepdim=True))
        reach = block
        if self.prompt_every:
            # Up to the last slot of the block.
            before = (own.flip(1).cumsum(1) > 0).flip(1)
            reach = torch.where(_clock(now) % self.prompt_every == 0, before, block)
        if not view.shifted:
            return reach
        # The last slot of the block predicts nothing of it.
        return sources(reach) | (reach & (rows.rank != now.stop - 1))

    def nothing_stops(self, now: Now) -> Tensor:
        """bool [B, 1]: whether all slots of the pass of a row go through all layers."""
        clock = _clock(now)
        # In the first pass it is time for both.
        due = [clock % every == 0 for every in (self.block_every, self.prompt_every) if every]
        return due[0] | due[-1] if due else now.index == 0

    def left(self, view: View, computed: Tensor, count: Tensor, shares: Tensor) -> Tensor:
        """How many slots of every row go on after each cut, int64 [cuts, B].

        Args:
            computed: int64 [B], how many enter the pass.
            count: int64 [B], how many it fills at least.
            shares: float64 [cuts, 1], those of the cuts; the published code counts in double precision.
        """
        now, filled = view.now, view.rows.fresh.sum(1)
        least = torch.minimum(filled + 2, (now.stop - now.start).squeeze(1)).maximum(count)
        found = (computed * shares).long().maximum(least).minimum(computed)
        return torch.where(self.nothing_stops(now).squeeze(1), computed, found)

    def bonus(self, view: View, open_: Tensor, count: Tensor) -> Tensor:
        """float32 [B, S]: what is added to the score of a slot; `open_` [B, S] are the masks of the block."""
        next_ = open_ & (open_.cumsum(1) <= count.clamp(min=1)[:, None])
        filled = view.rows.fresh
        if view.shifted:
            next_, filled = sources(next_), sources(filled)
        found = filled * (FILLED if self.alpha < 1 else 0.0)
        return found.masked_fill(next_, torch.inf)

    def score(self, confidence: Tensor, change: Tensor, bonus: Tensor, outside: Tensor) -> Tensor:
        """What the entries that are left go on by, [B, n]; -inf where `outside`.

        Args:
            confidence: [B, n] probabilities, 0 where there is no mask of the block.
            change: [B, n] of the hidden states.
            bonus: [B, n].
            outside: bool [B, n], where there is no entry.
        """
        change = change.masked_fill(outside | (change <= NO_CHANGE * torch.finfo(change.dtype).eps), 0)
        score = confidence * self.alpha + change / change.amax(1, keepdim=True).clamp(min=1) * (1 - self.alpha)
        if self.alpha > 0:
            surest = confidence.masked_fill(outside, -1).sort(dim=1, descending=True, stable=True).indices[:, :2]
            score.scatter_add_(1, surest, torch.full_like(surest, SUREST, dtype=score.dtype))
        return score.add_(bonus).masked_fill_(outside, -torch.inf)


def _clock(now: Now) -> Tensor:
    """int64 [B, 1]: the number of the pass, had every block before taken as many as it has slots."""
    return now.start + now.in_block


def _text(shares: Any) -> str:
    """Shares as text, from such or from pairs of numbers.

    Raises:
        ValueError: they are of another form, out of range, or out of order.
    """
    given = shares
    if not isinstance(shares, str):
        pairs = plain(shares)
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError(f'shares must be text such as "1/2@1/8+1/4@1/4", or pairs of numbers, got {given!r}')
        shares = "+".join("@".join(map(_number, pair)) for pair in pairs)
    try:
        pairs = _pairs(shares)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'shares must be text such as "1/2@1/8+1/4@1/4", got {given!r}') from None
    own, depths = zip((1.0, 0.0), *pairs, strict=True)
    if not all(0 < share <= 1 for share in own) or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"shares must be above 0 and at most 1, at depths from 0 to 1, got {given!r}")
    if list(own) != sorted(own, reverse=True) or list(depths) != sorted(depths):
        raise ValueError(f"shares must fall, and their depths rise, got {given!r}")
    return shares


def _number(value: Any) -> str:
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _pairs(shares: str) -> list[tuple[float, float]]:
    """(share, depth) of each part of the text."""
    parts = [part.partition("@") for part in shares.split("+")] if shares else []
    return [(float(Fraction(share)), float(Fraction(depth))) for share, _, depth in parts]
