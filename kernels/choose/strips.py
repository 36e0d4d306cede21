"""What is kept of logits that come strip by strip, or part by part, and the choice that follows from it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels.choose.choice import Choice
from dkv.kernels.choose.part import Part, exchanged
from dkv.kernels.choose.temperature import computable

BLOCK = 128
LOG2_E = 1.4426950408889634
# Numbers that PyTorch's loops over a CPU's vectors take at a time.
VECTOR = 32

# Logits of some columns [R, C], which are not written, and memory of that shape; they are the same if logits are free.
Strip = tuple[Tensor, Tensor]
# Tokens, log-confidences and, where asked for, entropies: [R] each.
Found = tuple[Tensor, Tensor, Tensor | None]


class Strips:
    """What is kept of the strips of R rows, [R, n] for n of them, and the choice that follows from all.

    Of each strip: its largest logit (`top`) and the sum of exp((logit - top) / temperature) over its others: a sum
    without its largest term keeps its precision when the probability of that is almost 1, and a difference divided
    by a low temperature overflows to what counts for nothing. For the entropy also the sum of those terms times their
    exponents (`weighted`).

    Args:
        choice: whose rule, temperature of the confidence, and wish for an entropy are followed.
        draw: (strip, its first column) -> values whose largest is drawn; None: the best id is taken.
    """

    def __init__(self, choice: Choice, draw: Callable[[Tensor, int], Tensor] | None):
        self.rule, self.temperature, self.draw = choice.rule, choice.confidence_temperature, draw
        self.asked, self.weighs = choice.entropy, choice.entropy or choice.rule == "entropy"
        names = ["top", "others", "best", "best_id"] + ["weighted"] * self.weighs + ["pair"] * (self.rule == "margin")
        self.kept = {name: [] for name in names + ["drawn", "drawn_id", "drawn_logit"] * (draw is not None)}

    def add(self, x: Tensor, scratch: Tensor, start: int) -> None:
        """Columns from `start` on that may be chosen, those among them that may not at -inf."""
        if self.draw is not None:
            value, place = _best(self.draw(x, start))
            self._keep(drawn=value, drawn_id=place + start, drawn_logit=x.gather(1, place))
        if self.rule == "margin":
            self._keep(pair=x.topk(min(2, x.shape[1])).values)
        place = self.add_closed(x, scratch)
        self._keep(best=self.kept["top"][-1], best_id=place + start)

    def add_closed(self, x: Tensor, scratch: Tensor) -> Tensor:
        """Columns that cannot be chosen, but have their share of the probability; the place of the largest."""
        top, place = _best(x)
        # Infinities are not subtracted from themselves.
        x = torch.sub(x, top.clamp(min=torch.finfo(x.dtype).min), out=scratch)
        self._cool(x.scatter_(1, place, -torch.inf))
        # A power of two, as its exp2 is three times as fast as exp on a CPU.
        if self.weighs:
            x.clamp_(min=-1e4)
            weight = x.exp() if self.rule == "entropy" else x.mul(LOG2_E).exp2_()
            self._keep(others=weight.sum(1, keepdim=True))
            self._keep(weighted=weight.mul_(x).sum(1, keepdim=True))
        else:
            self._keep(others=x.mul_(LOG2_E).exp2_().sum(1, keepdim=True))
        self._keep(top=top)
        return place

    def _keep(self, **found: Tensor) -> None:
        for name, x in found.items():
            self.kept[name].append(x)

    def _cool(self, difference: Tensor) -> Tensor:
        """A difference of logits divided by the temperature, in place."""
        if self.temperature == 1:
            return difference
        return difference.div_(computable(self.temperature, difference.dtype))

    def choice(self, part: Part | None) -> Found:
        if part and not self.kept["best"]:
            # Of what this part has, nothing may be chosen.
            none = torch.full_like(self.kept["top"][0], -torch.inf)
            for name in self.kept.keys() - {"top", "others", "weighted"}:
                self._keep(**{name: none.long() * 0 if name.endswith("id") else none})
        whole = self._merged({name: torch.cat(x, 1) for name, x in self.kept.items()})
        if part:
            whole = self._merged(exchanged(whole, part))
        top, first = whole["top"], whole["best"]
        # Nothing to choose from, or +inf.
        top = top.masked_fill((first == -torch.inf) | (top == torch.inf), torch.nan)
        log_total = torch.log1p(whole["others"])
        token, chosen = whole["best_id"], first
        if self.draw is not None:
            token, chosen = whole["drawn_id"], whole["drawn_logit"]
        sum_p_log_p = whole["weighted"] * torch.exp(-log_total) - log_total + (top - top) if self.weighs else None
        if self.rule == "entropy":
            confidence = sum_p_log_p
        else:
            confidence = self._cool((first if self.rule == "margin" else chosen) - top) - log_total
        if self.rule == "margin":
            confidence = confidence + torch.log1p(-torch.exp(self._cool(whole["pair"][:, 1:] - first)))
        return token.squeeze(1), confidence.squeeze(1), sum_p_log_p.abs().squeeze(1) if self.asked else None

    def _merged(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of all strips as that of one."""
        top, strip = kept["top"].max(1, keepdim=True)
        # As in a strip.
        down = self._cool(kept["top"] - top.clamp(min=torch.finfo(top.dtype).min))
        share, others = down.exp(), kept["others"]
        counted = torch.ones_like(others).scatter_(1, strip, 0)
        whole = {"top": top, "others": ((others + counted) * share).sum(1, keepdim=True)}
        if self.weighs:
            weighted = kept["weighted"] + down.clamp(min=-1e4) * (1 + others)
            whole["weighted"] = (weighted * share).sum(1, keepdim=True)
        if self.rule == "margin":
            pairs = F.pad(kept["pair"], (0, 1), value=-torch.inf)
            whole["pair"] = pairs.topk(2).values
        for leader, followers in (("best", ("best_id",)), ("drawn", ("drawn_id", "drawn_logit"))):
            if leader in kept:
                whole[leader], strip = kept[leader].max(1, keepdim=True)
                whole |= {name: kept[name].gather(1, strip) for name in followers}
        return whole


def _best(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row [R, C] and its lowest index, both [R, 1].

    `max` with an index goes through a CPU's values one by one: it gets only the winners of blocks, and then the
    block of the winner. Columns that cannot be divided into blocks are few: of the last strip, or beside a limit.
    """
    rows, columns = x.shape
    block = math.gcd(columns, BLOCK)
    if block < VECTOR or columns <= 2 * BLOCK:
        return x.max(-1, keepdim=True)
    blocks = x.view(rows, columns // block, block)
    # `argmax` and `gather`, as `max` starts all threads for however few values.
    winner = blocks.amax(-1).argmax(-1, keepdim=True)
    place = blocks.gather(1, winner.unsqueeze(2).expand(-1, -1, block)).view(rows, block).argmax(-1, keepdim=True)
    place.add_(winner, alpha=block)
    return x.gather(1, place), place


def padded(x: Tensor, scratch: Tensor) -> Strip:
    """A strip whose memory is laid out so that a row begins anew for vector instructions.

    What is left over at the end of a tensor is computed otherwise than the rest, in the last bit of exp2; a row
    must not depend on how many there are.
    """
    if spare := -x.shape[1] % VECTOR:
        x = scratch = F.pad(x, (0, spare))[:, : x.shape[1]]
    return x, scratch
