"""The kernel of the commit: an entry counts those that come before it."""

import triton
import triton.language as tl


@triton.jit
def _confidence(confidence, i, inside, stride):
    """Confidences in float32, NaN as the lowest of all."""
    value = tl.load(confidence + i.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def commit_kernel(
    canvas, token, confidence, eligible, count, positions, committed, entries,
    stride_cb, stride_cs, stride_tb, stride_tn, stride_fb, stride_fn, stride_eb, stride_en, stride_nb,
    stride_pb, stride_pn, OWN: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """One tile of entries against all of their row; grid (tiles of entries, B). The canvas is never read."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    inside = i < entries
    confidence += row * stride_fb
    eligible += row * stride_eb
    own = _confidence(confidence, i, inside, stride_fn)  # [I]
    rank = tl.zeros((OWN,), tl.int32)
    for first in tl.range(0, entries, OTHERS, num_stages=1):
        j = first + tl.arange(0, OTHERS)
        other = _confidence(confidence, j, j < entries, stride_fn)  # [J]
        open_ = tl.load(eligible + j.to(tl.int64) * stride_en, mask=j < entries, other=0) != 0
        above = other[None, :] > own[:, None]  # [I, J]
        level = (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum(((above | level) & open_[None, :]).to(tl.int32), 1)
    chosen = rank < tl.load(count + row * stride_nb)
    own_at = i.to(tl.int64)
    chosen = chosen & (tl.load(eligible + own_at * stride_en, mask=inside, other=0) != 0)
    tl.store(committed + row * entries + own_at, chosen, mask=inside)
    slot = own_at
    if positions is not None:
        slot = tl.load(positions + row * stride_pb + own_at * stride_pn, mask=chosen, other=0)
    value = tl.load(token + row * stride_tb + own_at * stride_tn, mask=chosen, other=0)
    tl.store(canvas + row * stride_cb + slot * stride_cs, value, mask=chosen)
