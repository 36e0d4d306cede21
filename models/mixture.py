"""Mixtures of experts in place of a layer's MLP: a router chooses a few gated MLPs for every token.

The scores and what follows from them differ by family, and are told by a `Mixture`. The weights of all experts of a
layer are two tensors, so that a GPU multiplies them in two launches.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.kernels.gate.op import SWIGLU

# The bias of a router: float32 in models of every dtype, as the published ones are.
EXPERT_BIAS = "expert_bias"
# Numbers of the largest tensor in the form for GPUs that have no grouped product.
STRIP = 1 << 26
# Below any sum of scores that float32 holds; keeps the division from 0 / 0.
TINY = 1e-20


@dataclass(frozen=True)
class Mixture:
    """How the experts of a model are chosen and weighted, and how large they are.

    Attributes:
        experts: of a layer.
        chosen: of them for each token.
        width: features inside an expert.
        score: "softmax" over all experts; or "sigmoid" of each, whose product with the router is in float32.
        groups: equal runs of experts, of which the `top_groups` with the largest sum of two scores are open to a token.
        top_groups: see there; no more than `groups`.
        renormalise: divide the weights of the chosen by their sum.
        scaling: the weights are then multiplied by this.
        bias: a number is added to the score of each expert: "choice", where experts are chosen; "weights", where they
            are weighted too; None: there is none.
        shared_width: features inside an MLP that takes part for every token with weight 1; 0: there is none.
        dense_layers: numbers of the layers with an ordinary MLP.
    """

    experts: int
    chosen: int
    width: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    scaling: float = 1.0
    bias: Literal["choice", "weights"] | None = None
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("experts", "chosen", "width", "groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a mixture must be at least 1, got {getattr(self, name)}")
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score of a mixture must be 'softmax' or 'sigmoid', got {self.score!r}")
        if self.bias not in (None, "choice", "weights"):
            raise ValueError(f"bias of a mixture must be 'choice', 'weights' or None, got {self.bias!r}")
        if self.experts % self.groups or (self.groups > 1 and self.experts < 2 * self.groups):
            raise ValueError(
                f"{self.experts} experts are not {self.groups} groups of one size, and of at least two experts"
            )
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups ({self.top_groups}) must be at most groups ({self.groups})")
        if self.chosen > self.experts // self.groups * self.top_groups:
            raise ValueError(
                f"chosen ({self.chosen}) must be at most the {self.experts // self.groups * self.top_groups} experts "
                f"of {self.top_groups} of {self.groups} groups"
            )
        if not 0 < self.scaling < math.inf:
            raise ValueError(f"scaling of a mixture must be a finite number above 0, got {self.scaling}")
        if self.shared_width < 0:
            raise ValueError(f"shared_width must be at least 0, got {self.shared_width}")


class Router(nn.Module):
    """Which experts a token goes through, and with which weights."""

    def __init__(self, mixture: Mixture, size: int):
        super().__init__()
        self.mixture = mixture
        self.weight = nn.Parameter(torch.randn(mixture.experts, size) * size**-0.5)
        bias = None if mixture.bias is None else nn.Parameter(torch.zeros(mixture.experts))
        self.register_parameter(EXPERT_BIAS, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d] -> weights [T, k] in the dtype of x, and numbers of experts int64 [T, k]."""
        mixture, wide = self.mixture, torch.promote_types(x.dtype, torch.float32)
        if mixture.score == "sigmoid":
            scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        else:
            scores = F.linear(x, self.weight).softmax(-1, dtype=wide)
        ranked = scores if self.expert_bias is None else scores + self.expert_bias
        if mixture.bias == "weights":
            scores = ranked
        if mixture.groups > 1:
            ranked = _open(ranked.unflatten(-1, (mixture.groups, -1)), mixture.top_groups).flatten(-2)
        chosen = ranked.topk(mixture.chosen, -1).indices
        weights = scores.gather(-1, chosen)
        if mixture.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        return (weights * mixture.scaling).to(x.dtype), chosen

    def _apply(self, fn, recurse=True):
        before = None if self.expert_bias is None else self.expert_bias.detach()
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias.dtype.itemsize < torch.float32.itemsize:
            # A cast to half precision is for the other weights.
            self.expert_bias.data = before.to(self.expert_bias.device, torch.float32)
        return self


def _open(scores: Tensor, most: int) -> Tensor:
    """Scores [T, groups, n], minus infinity outside the groups that are best by their two best."""
    best = scores.topk(2, -1).values.sum(-1).topk(most, -1).indices
    closed = torch.ones_like(scores[..., 0], dtype=torch.bool).scatter(-1, best, False)
    return scores.masked_fill(closed[..., None], -torch.inf)


class Bank(nn.Module):
    """One product of all experts of a layer: weights [E, outputs, inputs]."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs) * inputs**-0.5)

    @classmethod
    def of(cls, weights: list[Tensor]) -> "Bank":
        """A frozen bank of the weights of each expert, which are copied."""
        bank = cls.__new__(cls)
        nn.Module.__init__(bank)
        bank.weight = nn.Parameter(torch.stack(weights).detach(), requires_grad=False)
        return bank

    def groups(self, x: Tensor) -> bool:
        """Whether `grouped` multiplies x in one launch, and without waiting for the device."""
        return has_grouped_product(x, self.weight)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [N, inputs] -> [N, outputs]; entries before ends[e] (int32 [E]) and not before the last are expert e's."""
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)

    def each(self, x: Tensor, counts: list[int]) -> Tensor:
        """x [N, inputs], so many entries for each expert in turn -> [N, outputs]; only those with some are read."""
        every = zip(self.weight, x.split(counts), counts, strict=True)
        return torch.cat([F.linear(few, weight) for weight, few, count in every if count])


class Shared(nn.Module):
    """The gated MLP that all tokens go through."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    @classmethod
    def of(cls, products: dict[str, nn.Module]) -> "Shared":
        """An MLP of these three products, by their names."""
        shared = cls.__new__(cls)
        nn.Module.__init__(shared)
        for name, product in products.items():
            setattr(shared, name, product)
        return shared

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """What stands in the place of an MLP: the router, the experts, and the shared one.

    What a token gets does not depend on the others but for rounding: products of other numbers of tokens may add up in
    another order, on a CPU as well.
    """

    def __init__(self, mixture: Mixture, size: int):
        super().__init__()
        self.mixture = mixture
        self.router = Router(mixture, size)
        self.gate_up = Bank(mixture.experts, size, 2 * mixture.width)
        self.down = Bank(mixture.experts, mixture.width, size)
        self.shared = Shared(size, mixture.shared_width) if mixture.shared_width else None

    def of(self, gate_up: nn.Module, down: nn.Module, shared: nn.Module | None) -> "Experts":
        """The same router before these experts."""
        other = Experts.__new__(Experts)
        nn.Module.__init__(other)
        other.mixture, other.router = self.mixture, self.router
        other.gate_up, other.down, other.shared = gate_up, down, shared
        return other.train(self.training)

    def unpacked(self) -> "Experts":
        """With plain products; only where they are packed."""
        return self.of(self.gate_up.unpacked(), self.down.unpacked(), self.shared and self.shared.unpacked())

    def forward(self, h: Tensor) -> Tensor:
        """h [..., d] -> the same shape; reads nothing back from a GPU."""
        if h.numel() == 0:
            return torch.zeros_like(h)
        x = h.reshape(-1, h.shape[-1])
        weights, chosen = self.router(x)
        if x.device.type == "cpu" or self._groups(x):
            out = self._sorted(x, weights, chosen)
        else:
            out = self._everywhere(x, weights, chosen)
        if self.shared is not None:
            out = out + self.shared(x)
        return out.view(h.shape)

    def _groups(self, x: Tensor) -> bool:
        return self.gate_up.groups(x) and self.down.groups(x)

    def _sorted(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every expert on its own tokens, which stand one after the other."""
        experts, order = chosen.flatten().sort(stable=True)
        inputs = x.index_select(0, order // chosen.shape[1])
        if self._groups(x):
            numbers = torch.arange(self.mixture.experts, device=x.device)
            ends = torch.searchsorted(experts, numbers, right=True).int()
            outputs = self.down.grouped(gated(self.gate_up.grouped(inputs, ends)), ends)
        else:
            counts = experts.bincount(minlength=self.mixture.experts).tolist()
            outputs = self.down.each(gated(self.gate_up.each(inputs, counts)), counts)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        # Added in the order in which they were chosen, whatever the others chose.
        outputs = outputs.index_select(0, places).view(*chosen.shape, -1)
        return torch.bmm(weights[:, None], outputs)[:, 0]

    def _everywhere(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every expert on all tokens, in strips of experts: what a device does that groups no products.

        How many tokens an expert has is known on the device alone, and is not asked for.
        """
        (tokens, size), mixture = x.shape, self.mixture
        shares = x.new_zeros(tokens, mixture.experts).scatter(1, chosen, weights).T[..., None]
        strip = max(1, STRIP // (tokens * max(size, 2 * mixture.width)))
        banks = zip(self.gate_up.weight.split(strip), self.down.weight.split(strip), shares.split(strip), strict=True)
        out = torch.zeros_like(x)
        for gate_up, down, share in banks:
            outputs = gated(x @ gate_up.transpose(1, 2)) @ down.transpose(1, 2)
            # An expert that a token did not choose may overflow there.
            out = out + (outputs * share).masked_fill(share == 0, 0).sum(0)
        return out


def gated(x: Tensor) -> Tensor:
    """SiLU of the first half of the features, times the second half."""
    if not x.requires_grad:
        return SWIGLU(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies groups in one launch here: bfloat16 on Hopper, features a multiple of 16 bytes.

    Elsewhere its function is a loop that reads the ends of the groups back to the host.
    """
    if x.device.type != "cuda" or torch.version.hip or not hasattr(F, "grouped_mm"):
        return False
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    return x.dtype == torch.bfloat16 and aligned and torch.cuda.get_device_capability(x.device)[0] == 9
