"""The kernel of the commit: an entry counts those that come before it."""

import triton
import triton.language as tl


@triton.jit
def _confidence(confidence, row, i, inside):
    """Confidences in float32, NaN as the lowest of all."""
    at = confidence.ptr + row * confidence.stride[0] + i.to(tl.int64) * confidence.stride[1]
    value = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _eligible(eligible, row, i, inside):
    at = eligible.ptr + row * eligible.stride[0] + i.to(tl.int64) * eligible.stride[1]
    return tl.load(at, mask=inside, other=0) != 0


@triton.jit
def commit_kernel(
    canvas, token, confidence, eligible, count, positions, committed, entries, OWN: tl.constexpr, OTHERS: tl.constexpr
):
    """One tile of entries against all of their row; grid (tiles of entries, B). The canvas is never read."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    inside = i < entries
    own = _confidence(confidence, row, i, inside)  # [I]
    rank = tl.zeros((OWN,), tl.int32)
    for first in tl.range(0, entries, OTHERS, num_stages=1):
        j = first + tl.arange(0, OTHERS)
        other = _confidence(confidence, row, j, j < entries)  # [J]
        above = other[None, :] > own[:, None]  # [I, J]
        level = (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        counted = (above | level) & _eligible(eligible, row, j, j < entries)[None, :]
        rank += tl.sum(counted.to(tl.int32), 1)
    chosen = rank < tl.load(count.ptr + row * count.stride[0])
    chosen = chosen & _eligible(eligible, row, i, inside)
    own_at = i.to(tl.int64)
    tl.store(committed + row * entries + own_at, chosen, mask=inside)
    slot = own_at
    if positions is not None:
        places = positions.ptr + row * positions.stride[0] + own_at * positions.stride[1]
        slot = tl.load(places, mask=chosen, other=0)
    value = tl.load(token.ptr + row * token.stride[0] + own_at * token.stride[1], mask=chosen, other=0)
    tl.store(canvas.ptr + row * canvas.stride[0] + slot * canvas.stride[1], value, mask=chosen)
