"""What a slot is told by the other scored slots of its row, where a program has the whole row.

Only what may be filled counts.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from dkv.kernels.plan.kernel import loaded


class Scored(NamedTuple):
    """The scored slots of a row, as a program has them; the tensors are those of `advance_kernel`.

    Attributes:
        low, high: the slots among which they lie, low .. high - 1.
        begin: entry of the first of them.
    """

    confidence: tl.tensor
    scored: tl.tensor
    eligible: tl.tensor
    entries: tl.tensor
    low: tl.tensor
    high: tl.tensor
    begin: tl.tensor


@triton.jit
def scored_entries(row, slot, inside, before, FINITE_ONLY: tl.constexpr):
    """Of slots [I] which are scored, which of these may be filled, and their entries; `before` is the first entry.

    With FINITE_ONLY those of confidence -inf may not.
    """
    score = loaded(row.scored, 0, slot, inside)
    entry = before + tl.cumsum(score.to(tl.int32), 0) - 1
    score = score & (entry < row.entries)
    may = score
    if row.eligible is not None:
        may = loaded(row.eligible, 0, slot, score)
    if FINITE_ONLY:
        may = may & (level(row.confidence, entry, may, False) > float("-inf"))
    return score, may, entry


@triton.jit
def level(values, entry, mask, FINITE: tl.constexpr):
    """What entries are ordered by, float32 [I], NaN as the lowest; with FINITE -inf as the lowest finite number."""
    value = tl.load(values + entry, mask=mask, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))
    if FINITE:
        value = tl.maximum(value, -3.4028234663852886e38)
    return value


@triton.jit
def less_one(x):
    """exp(x) - 1 to the last digits: the error of exp is undone by that of log (Kahan)."""
    x = tl.maximum(x, -80.0)  # where exp(x) is not yet 0
    y = tl.exp(x)
    return tl.where(y == 1.0, x, (y - 1.0) * (x / tl.log(tl.where(y == 1.0, 2.0, y))))


@triton.jit
def nats(entropy, entry, mask):
    """Entropies [I] from 0 to 32, float32; NaN is as large as any."""
    value = tl.load(entropy + entry, mask=mask, other=0.0).to(tl.float32)
    return tl.where(value == value, tl.minimum(tl.maximum(value, 0.0), 32.0), 32.0)


@triton.jit
def units(entropy):
    """Entropies in units of 2^-36 nats, rounded up, int64: these have one sum, in whatever order."""
    return tl.ceil(entropy * 68719476736.0).to(tl.int64)


@triton.jit
def _others(row, start, before, OTHERS: tl.constexpr, FINITE_ONLY: tl.constexpr):
    """The next slots [J], from `start` on; then of them what `scored_entries` tells."""
    other = start + tl.arange(0, OTHERS)
    score, may, entry = scored_entries(row, other, other < row.high, before, FINITE_ONLY)
    return other, score, may, entry


@triton.jit
def _ahead(value, other, may, own, slot):
    """Whether entries [J] come before each of `own` (slots [I]): higher ones, and equal ones further left."""
    above = value[None, :] > own[:, None]
    same = (value[None, :] == own[:, None]) & (other[None, :] < slot[:, None])
    return (above | same) & may[None, :]


@triton.jit
def places(row, values, own, slot, OTHERS: tl.constexpr, FINITE: tl.constexpr, FINITE_ONLY: tl.constexpr):
    """How many entries of the row come before each of `own` (slots [I]), in the order of `values`."""
    place, before = tl.zeros_like(slot), row.begin
    for start in tl.range(row.low, row.high, OTHERS, num_stages=1):
        other, score, may, entry = _others(row, start, before, OTHERS, FINITE_ONLY)
        ahead = _ahead(level(values, entry, may, FINITE), other, may, own, slot)
        place += tl.sum(ahead.to(tl.int32), 1)
        before += tl.sum(score.to(tl.int32))
    return place


@triton.jit
def spent(
    row,
    values,
    entropy,
    own,
    own_entropy,
    slot,
    OTHERS: tl.constexpr,
    FINITE_ONLY: tl.constexpr,
    BUT_LARGEST: tl.constexpr,
):
    """The sum of the entropies of what comes before each of `own` (slots [I]) and of its own, but for one of them.

    That is the largest if BUT_LARGEST, else its own. In nats, float32.
    """
    total, largest, before = units(own_entropy), own_entropy, row.begin
    for start in tl.range(row.low, row.high, OTHERS, num_stages=1):
        other, score, may, entry = _others(row, start, before, OTHERS, FINITE_ONLY)
        ahead = _ahead(level(values, entry, may, False), other, may, own, slot)
        value = nats(entropy, entry, may)
        total += tl.sum(tl.where(ahead, units(value)[None, :], 0), 1)
        if BUT_LARGEST:
            largest = tl.maximum(largest, tl.max(tl.where(ahead, value[None, :], 0.0), 1))
        before += tl.sum(score.to(tl.int32))
    return (total - units(largest)).to(tl.float32) * 1.4551915228366852e-11


@triton.jit
def anchors(row, slot, bound, radius, OTHERS: tl.constexpr, FINITE_ONLY: tl.constexpr):
    """How many entries of the row that are at least as sure as `bound` stand at most `radius` from each slot [I]."""
    number, before = tl.zeros_like(slot), row.begin
    for start in tl.range(row.low, row.high, OTHERS, num_stages=1):
        other, score, may, entry = _others(row, start, before, OTHERS, FINITE_ONLY)
        anchor = may & (level(row.confidence, entry, may, True) >= bound)
        reached = tl.abs(other[None, :] - slot[:, None]) <= radius
        number += tl.sum((reached & anchor[None, :]).to(tl.int32), 1)
        before += tl.sum(score.to(tl.int32))
    return number
