"""The choice of a token in fast PyTorch, strip by strip over the vocabulary.

A strip of logits is made, used while it is in the cache, and forgotten: rows of the whole vocabulary are
never held. Only top-k and top-p need them, to sort, and confidences in the dtype of the model.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import starmap

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels.choose import reference
from dkv.kernels.choose.choice import Choice
from dkv.kernels.choose.temperature import computable, shares, tempered
from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.noise import gumbel
from dkv.kernels.common.workspace import Workspace

# Columns of a strip. The number does not depend on the rows, so that sums are the same in any batch. No measurement of
# this number and of those below has been kept.
STRIP = 8192
# Logits held at a time where all of a row's are needed.
SCRATCH_BYTES = 64 << 20
# Rows of the head at a time: a CPU re-orders the matrix for every product, and is faster with less of it at once.
PIECE = 1024
BLOCK = 128
LOG2_E = 1.4426950408889634
# Numbers that PyTorch's loops over a CPU's vectors take at a time.
VECTOR = 32

# Logits of some columns [R, C], which are not written, and memory of that shape; they are the same if logits are free.
Strip = tuple[Tensor, Tensor]
# Tokens, log-confidences and, where asked for, entropies: [R] each.
Found = tuple[Tensor, Tensor, Tensor | None]


def choose_token(logits, choice: Choice, row_keys, *, overwrite=False, workspace=None) -> Found:
    work = workspace or Workspace()
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def strips(rows: slice) -> Iterator[Strip]:
        for part in logits[rows].split(STRIP, 1):
            if overwrite and part.dtype == dtype:
                yield part, part
            else:
                scratch = work.take("strip", part.shape, dtype, part.device)
                yield part if part.dtype == dtype else scratch.copy_(part), scratch

    return _by_rows(strips, *logits.shape, logits.dtype, choice, row_keys)


def choose_token_fused(hidden, head_weight, choice: Choice, head_bias, row_keys, *, workspace=None):
    if not isinstance(head_weight, Tensor):

        def strips(rows: slice) -> Iterator[Strip]:
            return ((x, x) for x in map(wide, head_weight.strips(hidden[rows])))

        return _by_rows(strips, len(hidden), head_weight.out_features, hidden.dtype, choice, row_keys)
    work = workspace or Workspace()
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def strips(rows: slice) -> Iterator[Strip]:
        part = hidden[rows]
        for start in range(0, len(head_weight), STRIP):
            weight = head_weight[start : start + STRIP]
            shape = (len(part), len(weight))
            logits = work.take("product", shape, part.dtype, part.device)
            piece = PIECE if part.device.type == "cpu" else STRIP
            for some, out in zip(weight.split(piece), logits.split(piece, 1), strict=True):
                torch.mm(part, some.T, out=out)
            if head_bias is not None:
                logits.add_(head_bias[start : start + STRIP])
            if logits.dtype != dtype:
                logits = work.take("strip", shape, dtype, part.device).copy_(logits)
            yield logits, logits

    return _by_rows(strips, len(hidden), len(head_weight), hidden.dtype, choice, row_keys)


def _by_rows(
    strips: Callable[[slice], Iterable[Strip]],
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    choice: Choice,
    row_keys,
) -> Found:
    """Choose for all rows, with no more than `SCRATCH_BYTES` of logits held at a time; they are of `dtype`."""
    rounded = choice.confidence_dtype == "model"
    columns = vocabulary if rounded or choice.filters(vocabulary) else min(vocabulary, STRIP)
    step = max(1, SCRATCH_BYTES // (4 * columns))
    parts = []
    for start in range(0, max(rows, 1), step):
        part = slice(start, start + step)
        keys = None if row_keys is None else row_keys[part]
        if rounded:
            logits = torch.cat([x.to(dtype, copy=True) for x, _ in strips(part)], 1)
            parts.append(reference.choose_token(logits, choice, keys))
        else:
            parts.append(_choose_in_strips(strips(part), vocabulary, choice, keys))
    if len(parts) == 1:
        return parts[0]
    return tuple(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))


def _choose_in_strips(strips: Iterable[Strip], vocabulary: int, choice: Choice, row_keys) -> Found:
    """The choice from logits that come as strips of columns.

    A strip is used up before the next one is asked for.
    """
    limit = choice.limit(vocabulary)
    if choice.filters(vocabulary):
        strips = _filtered(strips, choice, limit)

    def draw(x: Tensor, start: int) -> Tensor:
        own, noisy = shares(choice.temperature, x.dtype)
        noise = gumbel(row_keys, x.shape[1], start).to(x.dtype)
        return noise.mul_(noisy).add_(x, alpha=own)

    found = _Strips(choice, draw if choice.temperature > 0 else None)
    closed, start = [], 0
    for x, scratch in starmap(_padded, strips):
        stop = start + x.shape[1]
        banned = [token - start for token in choice.banned if start <= token < min(stop, limit)]
        if banned:
            x = x if x is scratch else scratch.copy_(x)
            columns = [x.narrow(1, column, 1) for column in banned]
            closed += [column.clone() for column in columns]
            for column in columns:
                column.fill_(-torch.inf)
        if stop <= limit:
            found.add(x, scratch, start)
        else:
            open_ = max(limit - start, 0)
            if open_:
                found.add(x[:, :open_], scratch[:, :open_], start)
            found.add_closed(x[:, open_:], scratch[:, open_:])
        start = stop
    if closed:
        x = torch.cat(closed, 1)
        found.add_closed(x, x)
    return found.choice()


def _padded(x: Tensor, scratch: Tensor) -> Strip:
    """A strip whose memory is laid out so that a row begins anew for vector instructions.

    What is left over at the end of a tensor is computed otherwise than the rest, in the last bit of exp2; a row
    must not depend on how many there are.
    """
    if spare := -x.shape[1] % VECTOR:
        x = scratch = F.pad(x, (0, spare))[:, : x.shape[1]]
    return x, scratch


class _Strips:
    """What is kept of the strips of R rows, [R, 1] of each, and the choice that follows from all of them.

    Of each strip: its largest logit (`tops`) and the sum of exp((logit - top) / temperature) over its others: a sum
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
        self.tops, self.others, self.weighted = [], [], []
        self.best, self.pairs, self.drawn = [], [], []

    def add(self, x: Tensor, scratch: Tensor, start: int) -> None:
        """Columns from `start` on that may be chosen, those among them that may not at -inf."""
        if self.draw is not None:
            value, place = _best(self.draw(x, start))
            self.drawn.append((value, place + start, x.gather(1, place)))
        if self.rule == "margin":
            self.pairs.append(x.topk(min(2, x.shape[1])).values)
        self.best.append(self.add_closed(x, scratch) + start)

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
            self.others.append(weight.sum(1, keepdim=True))
            self.weighted.append(weight.mul_(x).sum(1, keepdim=True))
        else:
            self.others.append(x.mul_(LOG2_E).exp2_().sum(1, keepdim=True))
        self.tops.append(top)
        return place

    def _cool(self, difference: Tensor) -> Tensor:
        """A difference of logits divided by the temperature, in place."""
        if self.temperature == 1:
            return difference
        return difference.div_(computable(self.temperature, difference.dtype))

    def choice(self) -> Found:
        tops, best = torch.cat(self.tops, 1), torch.cat(self.best, 1)
        first, strip = tops[:, : best.shape[1]].max(1, keepdim=True)
        top, top_strip = tops.max(1, keepdim=True)
        # Nothing to choose from, or +inf.
        top = top.masked_fill((first == -torch.inf) | (top == torch.inf), torch.nan)
        down = self._cool(tops - top)
        counted = torch.ones_like(tops).scatter_(1, top_strip, 0)
        others = torch.cat(self.others, 1)
        log_total = torch.log1p(((others + counted) * down.exp()).sum(1, keepdim=True))
        token, chosen = best.gather(1, strip), first
        if self.draw is not None:
            value, drawn, logit = (torch.cat(x, 1) for x in zip(*self.drawn, strict=True))
            strip = value.argmax(1, keepdim=True)
            token, chosen = drawn.gather(1, strip), logit.gather(1, strip)
        sum_p_log_p = None
        if self.weighs:
            weighted = torch.cat(self.weighted, 1) + down.clamp(min=-1e4) * (1 + others)
            sum_p_log_p = (weighted * down.exp()).sum(1, keepdim=True) * torch.exp(-log_total) - log_total
        if self.rule == "entropy":
            confidence = sum_p_log_p
        elif self.rule == "margin":
            pairs = torch.cat([*self.pairs, torch.full_like(first, -torch.inf)], 1).topk(2).values
            apart = torch.log1p(-torch.exp(self._cool(pairs[:, 1:] - first)))
            confidence = self._cool(first - top) - log_total + apart
        else:
            confidence = self._cool(chosen - top) - log_total
        return token.squeeze(1), confidence.squeeze(1), sum_p_log_p.abs().squeeze(1) if self.asked else None


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


def _filtered(strips: Iterable[Strip], choice: Choice, limit: int) -> Iterator[Strip]:
    """The strips, with the ids outside top-p and top-k at -inf."""
    x = torch.cat([x.clone() for x, _ in strips], 1)
    allowed = x.clone()
    for token in choice.banned:
        allowed[:, token] = -torch.inf
    allowed[:, limit:] = -torch.inf
    gone = reference.dropped(tempered(x, choice.confidence_temperature), allowed.argmax(-1), choice)
    return ((part, part) for part in x.masked_fill_(gone, -torch.inf).split(STRIP, 1))
