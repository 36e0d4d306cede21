"""The tiles of slots around a gap, of which the kernel of attention visits no other.

A range of slots is `start` to `stop - 1`; its gap, `hidden` to `shown - 1`, lies inside it. A walk is the tiles that a
program visits, in two runs, before the gap and after it: first, one after the last; the same again. Its tiles are
numbered on from the first, without those in the gap.
"""

import triton
import triton.language as tl


@triton.jit
def part_around_gap(start, stop, hidden, shown, split, splits, N: tl.constexpr):
    """A part of the visible slots, whose tiles of N are divided among `splits` programs: a range and its gap.

    The gap that comes in may lie anywhere; one that hides nothing comes out as an empty one at `stop`. What comes out
    is int32, as so many numbers of 64 bits would cost registers.
    """
    start, stop, hidden, shown = _trimmed(start, stop, hidden, shown)
    start, stop, hidden, shown = start.to(tl.int32), stop.to(tl.int32), hidden.to(tl.int32), shown.to(tl.int32)
    walk = tiles(start, stop, hidden, shown, N)
    share = tl.cdiv(count(walk), splits)
    first = walk[0] + split.to(tl.int32) * share
    begin, end = numbered(first, walk) * N, (numbered(first + share - 1, walk) + 1) * N
    return _trimmed(tl.maximum(start, begin), tl.minimum(stop, end), hidden, shown)


@triton.jit
def _trimmed(start, stop, hidden, shown):
    """A range and the gap inside it; what a gap hides at an end of the range is taken off there."""
    inner, outer = tl.where(hidden < shown, hidden, stop), tl.where(hidden < shown, shown, stop)
    start = tl.where(inner <= start, tl.maximum(start, outer), start)
    stop = tl.maximum(start, tl.where(outer >= stop, tl.minimum(stop, inner), stop))
    inside = (inner > start) & (outer < stop)
    return start, stop, tl.where(inside, inner, stop), tl.where(inside, outer, stop)


@triton.jit
def tiles(start, stop, hidden, shown, N: tl.constexpr):
    """The walk over all tiles with visible slots; a tile with slots on both sides of the gap is of the first run."""
    border = tl.cdiv(hidden, N)
    return start // N, border, tl.maximum(shown // N, border), tl.cdiv(stop, N)


@triton.jit
def count(walk):
    """How many tiles a walk has."""
    return walk[1] - walk[0] + walk[3] - walk[2]


@triton.jit
def numbered(i, walk):
    """The tile of a number, which for the first of the walk is that tile itself."""
    return i + tl.where(i >= walk[1], walk[2] - walk[1], 0)
