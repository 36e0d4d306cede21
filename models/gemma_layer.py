"""A layer of DiffusionGemma, its modules named as in the checkpoints; attention itself is the caller's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.models.gemma_spec import GemmaLayer, GemmaSpec

# (number of the layer, query [T, Hq, D], key and value [T, Hkv, D]) -> [T, Hq, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# The norms of a layer, in the order of their use.
NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm_1"),
    *("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm"),
)


def normed(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm without weights, in at least float32."""
    return F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], None, eps)


def joined(*parts: nn.Linear) -> nn.Linear:
    """The products of the same states as one."""
    weight = torch.cat([part.weight.data for part in parts])
    product = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    product.weight = nn.Parameter(weight, requires_grad=False)
    return product


class Norm(nn.Module):
    """Root-mean-square norm, scaled in float32 too, and only then cast."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def scaled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What is `normed` already, scaled and cast."""
        return (x * self.weight.to(x.dtype)).to(dtype)


class Mlp(nn.Module):
    """A gated MLP with GELU in its tanh form."""

    def __init__(self, d: int, width: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, width, bias=False), nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)
        self.gate_up: nn.Linear | None = None

    def join_(self) -> None:
        """One product in place of two."""
        self.gate_up = joined(self.gate_proj, self.up_proj)
        self.gate_proj = self.up_proj = None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.gate_up else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class SelfConditioning(Mlp):
    """What the last step thought of every slot, added to the embedding of what stands there now."""

    def __init__(self, spec: GemmaSpec):
        super().__init__(spec.hidden_size, spec.intermediate_size)
        self.pre_norm = Norm(spec.hidden_size, spec.norm_eps)

    def forward(self, x: Tensor, soft: Tensor | None) -> Tensor:
        # Of zeros, the first step's, the MLP makes zeros.
        x = x if soft is None else x + super().forward(self.pre_norm(soft))
        return normed(x, self.pre_norm.eps).to(x.dtype)


class Router(nn.Module):
    """The experts of every entry and their weights, which add up to 1 before each expert's own scale."""

    def __init__(self, spec: GemmaSpec):
        super().__init__()
        self.proj = nn.Linear(spec.hidden_size, spec.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(spec.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(spec.num_experts))
        self.chosen = spec.chosen_experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d] normed -> weights and numbers of the experts [T, k]."""
        scores = self.proj(x * self.scale * x.shape[-1] ** -0.5)
        weight, expert = scores.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).topk(self.chosen, -1)
        return weight / weight.sum(-1, keepdim=True) * self.per_expert_scale[expert], expert


class Experts(nn.Module):
    """All experts of a layer in two tensors; the entries are sorted by expert, and each product is one call."""

    def __init__(self, spec: GemmaSpec):
        super().__init__()
        e, d, m = spec.num_experts, spec.hidden_size, spec.expert_size
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.empty(e, *s)) for s in ((2 * m, d), (d, m)))

    def forward(self, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        """x [T, d], and the weights and numbers of its experts [T, k] -> [T, d]."""
        number, order = expert.flatten().sort(stable=True)
        ends = torch.searchsorted(number, torch.arange(len(self.down_proj), device=x.device), right=True).int()
        gate, up = self._product(x[order // expert.shape[1]], self.gate_up_proj, ends).chunk(2, -1)
        sorted_out = self._product(F.gelu(gate, approximate="tanh") * up, self.down_proj, ends)
        out = torch.empty_like(sorted_out).index_copy_(0, order, sorted_out).view(*expert.shape, -1)
        return (out * weight.unsqueeze(-1)).to(x.dtype).sum(1)

    @staticmethod
    def _product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        # Before torch 2.10 there is none, and none of float64, or of rows that do not begin at multiples of 16 bytes.
        aligned = all(size * x.itemsize % 16 == 0 for size in weights.shape[1:])
        if hasattr(F, "grouped_mm") and aligned and x.dtype != torch.float64:
            return F.grouped_mm(x, weights.transpose(-2, -1), offs=ends)
        parts = x.tensor_split(ends[:-1].cpu().long())
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


class Attention(nn.Module):
    """Projections and norms of one layer's heads."""

    def __init__(self, spec: GemmaSpec, kind: GemmaLayer):
        super().__init__()
        d, size = spec.hidden_size, kind.head_dim
        self.q_proj = nn.Linear(d, spec.num_heads * size, bias=False)
        self.k_proj = nn.Linear(d, kind.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(d, kind.num_kv_heads * size, bias=False) if kind.window else None
        self.o_proj = nn.Linear(spec.num_heads * size, d, bias=False)
        self.q_norm, self.k_norm = Norm(size, spec.norm_eps), Norm(size, spec.norm_eps)
        self.qkv: nn.Linear | None = None
        self.gains: Tensor | None = None
        self.counts = (spec.num_heads, kind.num_kv_heads, size)

    def join_(self) -> None:
        """One product in place of three."""
        self.qkv, self.gains = joined(*self._projections()), self._gains()
        self.q_proj = self.k_proj = self.v_proj = None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, d] -> normed query [T, Hq, D], key and value [T, Hkv, D]."""
        queries, keys, size = self.counts
        raw = self.qkv(x) if self.qkv else torch.cat([proj(x) for proj in self._projections()], -1)
        plain = normed(raw.unflatten(-1, (-1, size)), self.q_norm.eps)
        gains = self._gains() if self.gains is None else self.gains
        query, key = (plain[:, : queries + keys] * gains).to(x.dtype).split((queries, keys), 1)
        # The last heads are values; without a projection of theirs these are the keys, which have other norms there.
        return query, key, plain[:, -keys:].to(x.dtype)

    def _projections(self) -> list[nn.Linear]:
        return [proj for proj in (self.q_proj, self.k_proj, self.v_proj) if proj is not None]

    def _gains(self) -> Tensor:
        """[Hq + Hkv, D], the weights of the norm of each head."""
        weights = zip((self.q_norm.weight, self.k_norm.weight), self.counts, strict=False)
        gains = torch.cat([weight.expand(count, -1) for weight, count in weights])
        return gains.to(torch.promote_types(gains.dtype, torch.float32))


class Layer(nn.Module):
    """Attention, then a dense MLP beside a mixture, each sum normed before it is added."""

    def __init__(self, spec: GemmaSpec, index: int):
        super().__init__()
        self.index = index
        self.self_attn = Attention(spec, spec.layers[index])
        self.mlp = Mlp(spec.hidden_size, spec.intermediate_size)
        self.router, self.experts = Router(spec), Experts(spec)
        for name in NORMS:
            setattr(self, name, Norm(spec.hidden_size, spec.norm_eps))
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, attend: Attend, scalar: Tensor) -> Tensor:
        """x [T, d]; `scalar` [1] is that of the reader, encoder or decoder."""
        out = attend(self.index, *self.self_attn.heads(self.input_layernorm(x)))
        x = x + self.post_attention_layernorm(self.self_attn.o_proj(out.flatten(-2)))
        # Three norms of the same differ in their weights alone.
        plain, dtype = normed(x, self.input_layernorm.eps), x.dtype
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm.scaled(plain, dtype)))
        mixed = self.experts(self.pre_feedforward_layernorm_2.scaled(plain, dtype), *self.router(plain.to(dtype)))
        mixed = self.post_feedforward_layernorm_2(mixed)
        return (x + self.post_feedforward_layernorm(dense + mixed)) * scalar
