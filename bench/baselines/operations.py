"""The operations in eager PyTorch, as they are commonly written: what the kernels are timed and checked against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """q [B, N, Hq, D] over k, v [B, S, Hkv, D]; `visible` bool [B, N or 1, S]. A hidden row gives NaN."""
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2).transpose(1, 2)
    return (weights(q, k, visible) @ v).transpose(1, 2)


def weights(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    """Of the same attention its weights [B, Hq, N, S]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2)
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores + torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf).unsqueeze(1)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, H, D] with tables [N, D / 2] or [B, N, D / 2], in the wider of the dtypes."""
    cos, sin = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def rope_scatter_(q, k, v, cos, sin, positions, k_buf, v_buf) -> Tensor:
    """Rotation with tables [P, D / 2] at `positions` [B, N], then two indexed writes; the rotated queries."""
    q, k = (rotate(x, cos[positions], sin[positions]) for x in (q, k))
    row = torch.arange(len(positions), device=positions.device).unsqueeze(1)
    k_buf[row, positions], v_buf[row, positions] = k, v
    return q


def rope_cat(q, k, v, cos, sin, positions, kept_k, kept_v, order) -> tuple[Tensor, Tensor, Tensor]:
    """The same as the published code does it, which keeps keys unrotated: join, put in order, rotate all.

    Args:
        kept_k, kept_v: [B, S - N, Hkv, D], of the slots that are not active.
        order: int64 [B, S], where every slot lies in the active ones followed by the kept ones.

    Returns:
        Rotated queries, and rotated keys and the values of all S slots.
    """
    row = torch.arange(len(order), device=order.device).unsqueeze(1)
    k, v = (torch.cat(pair, 1)[row, order] for pair in ((k, kept_k), (v, kept_v)))
    slots = k.shape[1]
    return rotate(q, cos[positions], sin[positions]), rotate(k, cos[:slots], sin[:slots]), v


def rms_norm(x: Tensor, gain: Tensor, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The sum of both, and before it its norm as LLaDA and Dream have it: in float32, cast back, then scaled."""
    total = residual + x
    return norm(total, gain, eps), total


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def choose_token(logits: Tensor, dtype: torch.dtype = torch.float64, entropy: bool = False) -> tuple[Tensor, ...]:
    """The best id and its probability, as a logarithm, from a softmax in `dtype`, as the published samplers have it;
    and where asked for, the entropy of that softmax.
    """
    token, p = logits.argmax(-1), logits.to(dtype).softmax(-1)
    chosen = token, p.gather(-1, token.unsqueeze(-1)).squeeze(-1).log()
    return (*chosen, torch.special.entr(p).sum(-1)) if entropy else chosen


def commit_(canvas: Tensor, token: Tensor, confidence: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """A top-k per row, as the published samplers do it, whose host reads `count` [B]."""
    confidence = confidence.masked_fill(~eligible, -torch.inf)
    committed = torch.zeros_like(eligible)
    for row in range(len(canvas)):
        committed[row, confidence[row].topk(count[row]).indices] = True
    canvas[committed] = token[committed]
    return committed
