"""Head norms, rotation and the write into the buffer, eager: what is right."""

from typing import NamedTuple

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.stored import Stored


class Norm(NamedTuple):
    """An RMS norm per head: gain [D], None for no norm, and eps."""

    gain: Tensor | None = None
    eps: float = 0.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, "rotate half" layout, in the wider of the dtypes of x and the tables.

    Args:
        x: [B, N, H, D], or packed [N, H, D].
        cos, sin: [N, W] or [B, N, W], W at most D / 2: the first 2 * W numbers of a head are rotated, in two halves,
            and the others are kept.
    """
    cos, sin, half = cos.unsqueeze(-2), sin.unsqueeze(-2), cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(x.dtype)


def head_norm(x: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
    """RMS norm over the head size; `norm` is (gain [D], eps) or None for none."""
    gain, eps = norm or Norm()
    if gain is None:
        return x
    normed = (wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed * gain).to(x.dtype)


def rope_scatter_(
    q,
    k,
    v,
    cos,
    sin,
    positions,
    k_buf: Stored,
    v_buf: Stored,
    rows: Tensor | None,
    query_positions: Tensor | None,
    q_norm: Norm,
    k_norm: Norm,
) -> Tensor:
    query_positions = positions if query_positions is None else query_positions
    rows = torch.arange(len(positions), device=q.device).unsqueeze(1) if rows is None else rows  # [B, 1] or [N]
    k_buf.put_((rows, positions), rotate(head_norm(k, k_norm), cos[positions], sin[positions]))
    v_buf.put_((rows, positions), v)
    return rotate(head_norm(q, q_norm), cos[query_positions], sin[query_positions])
