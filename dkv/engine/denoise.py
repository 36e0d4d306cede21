"""One step of a canvas: what the model thinks of its slots, which tokens are accepted, and the random numbers."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dkv.kernels.common import noise
from dkv.models.gemma import Gemma

# The most logits at once: 256 MiB of float32, a whole canvas of the published model.
MOST_LOGITS = 1 << 26


class Numbers(NamedTuple):
    """The random numbers of one canvas, for N steps.

    Attributes:
        start: int64 [B, C], the tokens that it starts from.
        renewed: int64 [N, B, C], the tokens of slots that are not accepted.
        uniform: float32 [N, B, C] in (0, 1), by which tokens are drawn.
        drawn: int64 [N, B, C], tokens in place of those drawn by `uniform`, of a recorded run.
    """

    start: Tensor
    renewed: Tensor
    uniform: Tensor
    drawn: Tensor | None = None


def numbers(keys: Tensor, canvas: int, steps: int, slots: int, vocabulary: int) -> Numbers:
    """The numbers of a canvas: functions of a row's seed and text, the canvas, the step and the slot.

    Args:
        keys: int64 [B, 2] from `dkv.engine.noise.text_keys`.
        canvas, steps, slots: its number, and how many steps and slots it has.
        vocabulary: tokens are below this.
    """
    # One hash for all uses: 0 is the start, then every step has two.
    uses = torch.arange(1 + 2 * steps, device=keys.device)
    shape = (len(uses), len(keys), 1)
    places = (uses.view(-1, 1, 1).expand(shape), torch.full_like(uses, canvas).view(-1, 1, 1).expand(shape))
    rows = torch.cat((keys.expand(*shape[:2], 2), *places), -1)
    found = noise.uniform(rows.flatten(0, 1), slots).unflatten(0, shape[:2])
    tokens = (found[: 1 + steps] * vocabulary).long().clamp_(max=vocabulary - 1)
    return Numbers(tokens[0], tokens[1:], found[1 + steps :])


@dataclass
class Thought:
    """What a pass thinks of every slot of some canvases.

    Attributes:
        best, drawn: int64 [R, C], the best token, the lowest of equals, and one drawn by the probabilities.
        entropy: float32 [R, C] of the probabilities, in nats.
        soft: [R, C, d], the mean embedding under them.
    """

    best: Tensor
    drawn: Tensor
    entropy: Tensor
    soft: Tensor


def think(model: Gemma, hidden: Tensor, temperature: float, uniform: Tensor) -> Thought:
    """What the model thinks at a temperature, from hidden states [R, C, d] and numbers [R, C] in (0, 1).

    Logits are made a few slots at a time, and none are kept.
    """
    shape = hidden.shape[:2]
    slots = max(MOST_LOGITS // model.spec.vocab_size, 1)
    pieces = zip(hidden.flatten(0, 1).split(slots), uniform.flatten().split(slots), strict=True)
    parts = [_think(model, some, temperature, numbers) for some, numbers in pieces]
    return Thought(*(torch.cat(part).unflatten(0, shape) for part in zip(*parts, strict=True)))


def _think(model: Gemma, hidden: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, ...]:
    if model.ranks is not None:
        return _think_together(model, hidden, temperature, uniform)
    logits = model.logits(hidden).div_(temperature)
    # Ids that no text has.
    logits[:, model.spec.vocab_limit or logits.shape[1] :] = -torch.inf
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    # -inf times 0 is no number, where a logit is that low.
    entropy = -(p * log_p.clamp_(min=torch.finfo(p.dtype).min)).sum(-1)
    # The published loop hands its logits on in the dtype of the weights.
    soft = model.soft(p if model.dtype == p.dtype else logits.to(model.dtype).softmax(-1, dtype=p.dtype))
    sums = p.cumsum(-1)
    # The first whose sum is above: never one of probability 0.
    drawn = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).squeeze(-1)
    return logits.argmax(-1), drawn.clamp_(max=p.shape[-1] - 1), entropy, soft


def _think_together(model: Gemma, hidden: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, ...]:
    """As `_think` where several processes share the vocabulary: a few numbers a slot are exchanged, and no logits."""
    ranks, first = model.ranks, model.head.first
    logits = model.own_logits(hidden).div_(temperature)
    logits[:, max((model.spec.vocab_limit or model.spec.vocab_size) - first, 0) :] = -torch.inf
    top, place = logits.max(-1)
    # Float64 holds ids, and numbers of all dtypes, exactly.
    tops, ids = ranks.gathered(torch.stack((top.double(), (place + first).double()))).unbind(1)
    top, process = tops.max(0)
    best, top = ids.gather(0, process[None])[0].long(), top.to(logits.dtype)[:, None]
    below = (logits - top).clamp_(min=torch.finfo(logits.dtype).min)
    weight = below.exp()
    sums = weight.cumsum(-1)
    handed = weight
    if model.dtype != weight.dtype:
        handed = (logits.to(model.dtype).to(weight.dtype) - top.to(model.dtype)).exp()
    own = torch.stack((sums[:, -1], (weight * below).sum(-1), handed.sum(-1)))
    every = ranks.gathered(own)
    _, spread, handed_total = every.sum(0)
    # Where the sums of each process end: a process begins where the one before it has ended, to the last bit.
    ends = every[:, 0].cumsum(0)
    total, before = ends[-1], ends[ranks.rank - 1] if ranks.rank else torch.zeros_like(ends[0])
    entropy = total.log() - spread / total
    # Of the first process whose sums go above; never an id of probability 0.
    found = torch.searchsorted(sums + before[:, None], (uniform * total)[:, None], right=True)
    none = model.spec.vocab_size - 1
    found = (found + first).masked_fill(found == logits.shape[1], none)
    drawn = ranks.gathered(found).amin(0).squeeze(-1)
    return best, drawn, entropy, model.soft(handed / handed_total[:, None])


def accepted(entropy: Tensor, bound: float) -> Tensor:
    """bool [R, C]: slots in ascending order of entropy while the sum of those before is at most the bound."""
    ascending, order = entropy.sort(dim=-1, stable=True)
    chosen = ascending.cumsum(-1) - ascending <= bound
    return torch.zeros_like(chosen).scatter_(1, order, chosen)
