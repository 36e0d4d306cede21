"""The choice from a vocabulary that several processes share: each has the logits of some ids, and all choose alike."""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels.choose.choice import Choice
from dkv.kernels.choose.temperature import computable


class Part(Protocol):
    """A layer that gives logits strip by strip, of the ids that this process has.

    Attributes:
        first: its first id.
        number, parts: which part it is, in the order of the ids, and how many there are.
        in_features, out_features: of the whole layer; called, it gives the logits of all ids [R, V].
    """

    first: int
    number: int
    parts: int
    in_features: int
    out_features: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of all ids, [R, V]."""

    def strips(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of the own ids, [R, C] each, in their order."""

    def gathered(self, x: Tensor) -> Tensor:
        """What all processes have of x [R, n], by part, [parts, R, n]: the same bits in all of them."""


def part_of(head: object) -> Part | None:
    """The layer, if it has a part of the vocabulary alone."""
    return head if getattr(head, "gathered", None) else None


def exchanged(whole: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    """Of what every part has, [R, n], that of all parts in the order of their ids, [R, parts * n].

    One exchange, of a few numbers a row; float64 holds ids, and numbers of all dtypes, exactly.
    """
    sizes = [x.shape[1] for x in whole.values()]
    found = part.gathered(torch.cat([x.double() for x in whole.values()], 1)).movedim(0, 1)
    columns = zip(whole.items(), found.split(sizes, 2), strict=True)
    return {name: column.flatten(1).to(x.dtype) for (name, x), column in columns}


# So many of its largest logits a part tells of at first; four times as many where they do not reach `top_p`.
FEW = 64


def dropped(x: Tensor, allowed: Tensor, choice: Choice, part: Part) -> Tensor:
    """Which own ids top-p and then top-k drop, bool [R, C]: as `reference.dropped`, from a few logits of every part.

    Args:
        x: [R, C], the own logits.
        allowed: those of ids that may be chosen, the others at -inf; the best of all parts is always kept.
    """
    best = allowed.argmax(-1, keepdim=True)
    told = part.gathered(torch.cat((x.amax(-1, keepdim=True), allowed.gather(1, best)), 1))
    largest, leader = told[..., :1].amax(0), told[..., 1].argmax(0)
    cooled = (x - largest.masked_fill(largest.isinf(), 0)) / computable(choice.confidence_temperature, x.dtype)
    gone = torch.zeros_like(cooled, dtype=torch.bool)
    ordered, before = _largest(cooled, choice, part)
    if choice.top_p is not None and choice.top_p < 1:
        count = (before <= choice.top_p).sum(1, keepdim=True).clamp(min=1)
        last = ordered.gather(1, count - 1)
        # Of equal ones the lowest ids stay: those of lower parts before the own.
        equal = cooled == last
        others = part.gathered(equal.sum(1, keepdim=True))[: part.number].sum(0)
        room = count - (ordered > last).sum(1, keepdim=True) - others
        gone = (cooled < last) | (equal & (equal.cumsum(1) > room))
        # What is dropped is -inf to top-k.
        ordered = ordered.masked_fill(torch.arange(ordered.shape[1], device=x.device) >= count, -torch.inf)
    if choice.top_k is not None and choice.top_k < part.out_features:
        gone = gone | (cooled < ordered[:, choice.top_k - 1, None])
    mine = (leader == part.number)[:, None]
    return gone.scatter(1, best, gone.gather(1, best) & ~mine)


def _largest(cooled: Tensor, choice: Choice, part: Part) -> tuple[Tensor, Tensor]:
    """The largest logits of all parts in order, [R, n], as many as are needed; and the probability before each."""
    total = part.gathered(cooled.exp().sum(-1, keepdim=True)).sum(0)
    top_p, few = 1.0 if choice.top_p is None else choice.top_p, max(FEW, choice.top_k or 0)
    most = -(-part.out_features // part.parts)
    while True:
        own = cooled.topk(min(few, cooled.shape[1])).values
        # A part with fewer ids has no more.
        found = part.gathered(F.pad(own, (0, min(few, most) - own.shape[1]), value=-torch.inf))
        ordered = found.movedim(0, 1).flatten(1).sort(-1, descending=True).values
        before = F.pad((ordered.exp() / total).cumsum(-1)[:, :-1], (1, 0))
        # Below the last one that a part tells of, it may have others.
        reached = (before > top_p) & (ordered >= found[..., -1].amax(0)[:, None])
        if few >= most or top_p >= 1 or bool(reached.any(1).all()):
            return ordered, before
        few *= 4
