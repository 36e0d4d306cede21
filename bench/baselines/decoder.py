"""The forward pass of today's decoders in eager PyTorch, on dkv's weights: logits of all slots of a pass.

Written as the published classes are, which follow those of transformers: keys are kept rotated, heads of keys and
values are repeated for their queries, and experts are three products each.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.bench.baselines.operations import norm as eager_norm
from dkv.models import Transformer
from dkv.models.layers import Layer, RMSNorm
from dkv.models.mixture import Experts

# (layer, fresh keys, rotated, and values [B, Hkv, N, D]) -> keys and values of all slots that are seen [B, Hkv, L, D]
Join = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward(model: Transformer, tokens: Tensor, begin: int, join: Join, visible: Tensor | None) -> Tensor:
    """Logits of slots that stand one after the other.

    Args:
        model: its weights in `nn.Linear`.
        tokens: int64 [B, N], ids at the slots from `begin` on.
        join: puts the fresh keys and values beside those that were kept.
        visible: [N, L], as the mask of `scaled_dot_product_attention`; None: all L slots are seen.

    Returns:
        [B, N, V]
    """
    stop = begin + tokens.shape[1]
    cos, sin, *scales = (table[begin:stop] for table in model.rope_tables(stop))
    rope = tuple(torch.cat((table, table), -1) for table in (cos, sin))
    x = model.embed(tokens)
    for layer in model.layers:
        x = x + _attention(layer, _norm(layer.attn_norm, x), rope, scales, join, visible)
        h = _norm(layer.mlp_norm, x)
        x = x + (_gated(layer, h) if layer.experts is None else _mixture(layer.experts, h))
    return model.head(_norm(model.norm, x))


def _attention(
    layer: Layer, h: Tensor, rope: tuple[Tensor, ...], scales: list[Tensor], join: Join, visible: Tensor | None
) -> Tensor:
    query, key, value = layer.q_proj(h), layer.k_proj(h), layer.v_proj(h)
    if layer.clip_qkv is not None:
        query, key, value = (t.clamp(-layer.clip_qkv, layer.clip_qkv) for t in (query, key, value))
    query, key, value = (t.unflatten(-1, (-1, layer.head_dim)) for t in (query, key, value))
    if layer.q_norm is not None:
        query, key = _norm(layer.q_norm, query), _norm(layer.k_norm, key)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    query, key = _rotated(query, *rope), _rotated(key, *rope)
    for scale in scales:
        query = query * scale[:, None]
    key, value = join(layer.index, key, value)
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return layer.o_proj(out.transpose(1, 2).flatten(-2))


def _gated(layer: Layer, h: Tensor) -> Tensor:
    return layer.down_proj(F.silu(layer.gate_proj(h)) * layer.up_proj(h))


def _mixture(experts: Experts, h: Tensor) -> Tensor:
    x = h.flatten(0, 1)
    weights, chosen = experts.router(x)
    # The class of LLaDA2 sorts tokens by expert; the others follow Mixtral's.
    way = _in_order if experts.mixture.score == "sigmoid" else _one_by_one
    out = way(experts, x, weights, chosen)
    if experts.shared is not None:
        out = out + experts.shared(x)
    return out.view_as(h)


def _in_order(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Tokens in the order of their experts, whose outputs are put back and added up."""
    counts = torch.zeros(len(x), experts.mixture.experts, dtype=torch.int64, device=x.device).scatter(1, chosen, 1)
    order = chosen.flatten().argsort()
    each = x[order // chosen.shape[1]].split(counts.sum(0).tolist())
    found = torch.cat([_expert(experts, number, few) for number, few in enumerate(each) if len(few)])
    back = torch.empty_like(found)
    back[order] = found
    return (back.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


def _one_by_one(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Every expert looks for its tokens, and adds what it gives to their sums."""
    out, of_expert = torch.zeros_like(x), F.one_hot(chosen, experts.mixture.experts).permute(2, 1, 0)
    for number in range(experts.mixture.experts):
        rank, token = torch.where(of_expert[number])
        found = _expert(experts, number, x[token]) * weights[token, rank, None]
        out.index_add_(0, token, found)
    return out


def _expert(experts: Experts, number: int, x: Tensor) -> Tensor:
    gate, up = experts.gate_up.weight[number].chunk(2)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), experts.down.weight[number])


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return eager_norm(x, norm.weight, norm.eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, D] by tables [N, w], of which w <= D features are turned."""
    wide, rest = x[..., : cos.shape[-1]].to(cos.dtype), x[..., cos.shape[-1] :]
    left, right = wide.chunk(2, -1)
    turned = (wide * cos + torch.cat((-right, left), -1) * sin).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
