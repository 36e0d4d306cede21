"""The forward pass of the eager baselines, in plain PyTorch on dkv's weights: logits of all slots of a pass.

Keys are rotated in every pass, and what joins the fresh ones to those that were kept is the baseline's own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.bench.baselines.operations import norm as eager_norm
from dkv.models import Transformer
from dkv.models.layers import Layer, RMSNorm

# (layer, fresh keys and values [B, N, d_kv]) -> keys and values of all slots [B, L, d_kv]
Join = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# (query [B, H, N, D], key and value [B, H, L, D]) -> [B, H, N, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward(
    model: Transformer,
    tokens: Tensor,
    join: Join,
    by_query: tuple[Tensor, ...],
    by_key: tuple[Tensor, ...],
    attend: Attend = F.scaled_dot_product_attention,
) -> Tensor:
    """Logits [B, N, V] of ids [B, N]; cos and sin [..., N or L, D] of these, and of the keys as `join` orders them."""
    x = model.embed(tokens)
    for layer in model.layers:
        x = x + _attention(layer, _norm(layer.attn_norm, x), join, by_query, by_key, attend)
        h = _norm(layer.mlp_norm, x)
        x = x + layer.down_proj(F.silu(layer.gate_proj(h)) * layer.up_proj(h))
    return model.head(_norm(model.norm, x))


def _attention(
    layer: Layer,
    h: Tensor,
    join: Join,
    by_query: tuple[Tensor, ...],
    by_key: tuple[Tensor, ...],
    attend: Attend,
) -> Tensor:
    query, (key, value) = layer.q_proj(h), join(layer.index, layer.k_proj(h), layer.v_proj(h))
    query, key, value = (t.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for t in (query, key, value))
    query, key = _rotated(query, *by_query), _rotated(key, *by_key)
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    out = attend(query, key, value)
    return layer.o_proj(out.transpose(1, 2).flatten(-2))


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return eager_norm(x, norm.weight, norm.eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    left, right = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-right, left), -1) * sin).to(x.dtype)
