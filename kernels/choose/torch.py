"""The choice of a token in fast PyTorch, strip by strip over the vocabulary.

A strip of logits is made, used while it is in the cache, and forgotten: rows of the whole vocabulary are
never held. Only top-k and top-p need them, to sort, and confidences in the dtype of the model.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import starmap

import torch
from torch import Tensor

from dkv.kernels.choose import reference
from dkv.kernels.choose.choice import Choice
from dkv.kernels.choose.part import Part, dropped, part_of
from dkv.kernels.choose.strips import Found, Strip, Strips, padded
from dkv.kernels.choose.temperature import shares, tempered
from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.noise import gumbel
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.linear.torch import int8_linear

# Columns of a strip. The number does not depend on the rows, so that sums are the same in any batch. No measurement of
# this number and of those below has been kept.
STRIP = 8192
# Logits held at a time where all of a row's are needed.
SCRATCH_BYTES = 64 << 20
# Rows of the head at a time: a CPU re-orders the matrix for every product, and is faster with less of it at once.
PIECE = 1024


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


def choose_token_fused(hidden, head_weight, choice: Choice, head_bias, head_scales, row_keys, *, workspace=None):
    if isinstance(head_weight, Tensor):
        work = workspace or Workspace()
        dtype, size = torch.promote_types(hidden.dtype, torch.float32), len(head_weight)

        def strips(rows: slice) -> Iterator[Strip]:
            for logits in products(hidden[rows], head_weight, head_bias, work, head_scales):
                if logits.dtype != dtype:
                    logits = work.take("strip", logits.shape, dtype, logits.device).copy_(logits)
                yield logits, logits

        return _by_rows(strips, len(hidden), size, hidden.dtype, choice, row_keys)
    part, size = part_of(head_weight), head_weight.out_features
    # A softmax that is rounded needs all logits of a row.
    whole = part and choice.confidence_dtype == "model"

    def strips(rows: slice) -> Iterator[Strip]:
        found = [head_weight(hidden[rows])] if whole else head_weight.strips(hidden[rows])
        return ((x, x) for x in map(wide, found))

    return _by_rows(strips, len(hidden), size, hidden.dtype, choice, row_keys, None if whole else part)


def products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, work: Workspace, scales: Tensor | None = None
) -> Iterator[Tensor]:
    """`hidden @ weight.T + bias` strip by strip, each in the memory of the one before it; `int8_linear` with scales."""
    for start in range(0, len(weight), STRIP):
        ids = slice(start, start + STRIP)
        some, shift = weight[ids], None if bias is None else bias[ids]
        if scales is not None:
            yield int8_linear(hidden, some, scales[ids], shift, None)
            continue
        logits = work.take("product", (len(hidden), len(some)), hidden.dtype, hidden.device)
        piece = PIECE if hidden.device.type == "cpu" else STRIP
        for rows, out in zip(some.split(piece), logits.split(piece, 1), strict=True):
            torch.mm(hidden, rows.T, out=out)
        if shift is not None:
            logits.add_(shift)
        yield logits


def _by_rows(
    strips: Callable[[slice], Iterable[Strip]],
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    choice: Choice,
    row_keys,
    part: Part | None = None,
) -> Found:
    """Choose for all rows, with no more than `SCRATCH_BYTES` of logits held at a time; they are of `dtype`.

    With `part` the strips are of its ids alone.
    """
    rounded = choice.confidence_dtype == "model"
    columns = vocabulary if rounded or choice.filters(vocabulary) else min(vocabulary, STRIP)
    step = max(1, SCRATCH_BYTES // (4 * columns))
    parts = []
    for start in range(0, max(rows, 1), step):
        some = slice(start, start + step)
        keys = None if row_keys is None else row_keys[some]
        if rounded:
            logits = torch.cat([x.to(dtype, copy=True) for x, _ in strips(some)], 1)
            parts.append(reference.choose_token(logits, choice, keys))
        else:
            parts.append(_choose_in_strips(strips(some), vocabulary, choice, keys, part))
    if len(parts) == 1:
        return parts[0]
    return tuple(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))


def _choose_in_strips(
    strips: Iterable[Strip], vocabulary: int, choice: Choice, row_keys, part: Part | None = None
) -> Found:
    """The choice from logits that come as strips of columns; those of a part of the vocabulary, if one is given.

    A strip is used up before the next one is asked for.
    """
    limit = choice.limit(vocabulary)
    if choice.filters(vocabulary):
        strips = _filtered(strips, choice, limit, part)

    def draw(x: Tensor, start: int) -> Tensor:
        own, noisy = shares(choice.temperature, x.dtype)
        noise = gumbel(row_keys, x.shape[1], start).to(x.dtype)
        return noise.mul_(noisy).add_(x, alpha=own)

    found = Strips(choice, draw if choice.temperature > 0 else None)
    closed, start = [], part.first if part else 0
    for x, scratch in starmap(padded, strips):
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
    return found.choice(part)


def _filtered(strips: Iterable[Strip], choice: Choice, limit: int, part: Part | None) -> Iterator[Strip]:
    """The strips, with the ids outside top-p and top-k at -inf."""
    x = torch.cat([x.clone() for x, _ in strips], 1)
    allowed, first = x.clone(), part.first if part else 0
    for token in choice.banned:
        if first <= token < first + x.shape[1]:
            allowed[:, token - first] = -torch.inf
    allowed[:, max(limit - first, 0) :] = -torch.inf
    if part:
        gone = dropped(x, allowed, choice, part)
    else:
        gone = reference.dropped(tempered(x, choice.confidence_temperature), allowed.argmax(-1), choice)
    return ((part, part) for part in x.masked_fill_(gone, -torch.inf).split(STRIP, 1))
