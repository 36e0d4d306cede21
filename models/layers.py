"""A layer of the transformer: attention, and a gated MLP or a mixture of experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.kernels.norm.op import RMS_NORM
from dkv.kernels.rope_scatter.reference import Norm
from dkv.models.gemma_spec import GemmaSpec
from dkv.models.mixture import Experts
from dkv.models.spec import ModelSpec
from dkv.parallel import Ranks

# (block, query [..., R, Hq, D], key and value [..., N, Hkv, D]) -> [..., R, Hq, D]
Attend = Callable[["Block", Tensor, Tensor, Tensor], Tensor]
NO_NORM = Norm()


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in float32, cast back, then scaled (as LLaDA and Dream do)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMS_NORM(x, self.weight, self.eps, None)[0]

    def added(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + delta, and that sum; delta None adds nothing."""
        return (self(x), x) if delta is None else RMS_NORM(delta, self.weight, self.eps, x)


class Network(nn.Module):
    """What every model has: its spec, the table of its tokens, and what these tell."""

    def __init__(self, spec: ModelSpec | GemmaSpec):
        super().__init__()
        self.spec = spec
        # The processes that share the model; None: it is whole here.
        self.ranks: Ranks | None = None
        # Given its table, as the layer would otherwise load the compiler (2 s) to make one.
        table = torch.randn(spec.vocab_size, spec.hidden_size)
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=table)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def num_kv_heads(self) -> int:
        """The heads of keys and values that this process has of a layer."""
        return self.spec.num_kv_heads // (self.ranks.size if self.ranks else 1)

    @property
    def num_parameters(self) -> int:
        """Weights of all layers, packed ones included."""
        packed = sum(getattr(module, "num_packed", 0) for module in self.modules())
        return packed + sum(p.numel() for p in self.parameters())


class Block(nn.Module):
    """Attention and a gated MLP (or a mixture of them), each on a normed copy that is added to the residual.

    What the MLP gives is handed on beside the residual, as the norm that comes next adds it in the same launch.
    """

    # What is no module, as it stands in the spec.
    SETTINGS = ("index", "head_dim", "clip_qkv")

    def forward(
        self, x: Tensor, delta: Tensor | None, attend: Attend, rows: Tensor | None = None, every: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Residual x [..., d] and what is to be added to it -> the same; or [T, d] -> [R, d], for `rows` [R] alone.

        With `every` the queries of all T are asked, and `attend` gives the `rows` [R] alone.
        """
        h, x = self.attn_norm.added(x, delta)
        query, key, value = self._qkv(h, None if every else rows)
        if self.clip_qkv is not None:
            query, key, value = (part.clamp(-self.clip_qkv, self.clip_qkv) for part in (query, key, value))
        if rows is not None:
            x = x.index_select(0, rows)
        h, x = self.mlp_norm.added(x, self.o_proj(attend(self, query, key, value).flatten(-2)))
        return x, self._mlp(h) if self.experts is None else self.experts(h)

    def _heads(self, x: Tensor) -> Tensor:
        *rest, width = x.shape
        return x.view(*rest, width // self.head_dim, self.head_dim)


class Layer(Block):
    """A block whose products are those of the published models, one by one."""

    PARTS = (
        *("attn_norm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
        *("mlp_norm", "gate_proj", "up_proj", "down_proj", "experts"),
    )

    def __init__(self, spec: ModelSpec, index: int):
        super().__init__()
        self.index, self.head_dim, self.clip_qkv = index, spec.head_dim, spec.clip_qkv
        d, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        bias = spec.linear_bias
        self.attn_norm = RMSNorm(d, spec.norm_eps)
        self.q_proj = nn.Linear(d, q, bias=spec.qkv_bias or bias)
        self.k_proj = nn.Linear(d, kv, bias=spec.qkv_bias or bias)
        self.v_proj = nn.Linear(d, kv, bias=spec.qkv_bias or bias)
        self.o_proj = nn.Linear(q, d, bias=spec.output_bias or bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.mlp_norm = RMSNorm(d, spec.norm_eps)
        # Of the MLP and the experts a layer has one.
        self.gate_proj = self.up_proj = self.down_proj = self.experts = None
        if spec.mixture is not None and index not in spec.mixture.dense_layers:
            self.experts = Experts(spec.mixture, d)
        else:
            self.gate_proj = nn.Linear(d, spec.intermediate_size, bias=bias)
            self.up_proj = nn.Linear(d, spec.intermediate_size, bias=bias)
            self.down_proj = nn.Linear(spec.intermediate_size, d, bias=bias)

    @classmethod
    def of(cls, block: Block, **products: nn.Module) -> "Layer":
        """A layer with the norms of another block, and these products."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name in (*cls.SETTINGS, *cls.PARTS):
            setattr(layer, name, products[name] if name in products else getattr(block, name))
        return layer.train(block.training)

    def _qkv(self, h: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self._heads(self.k_proj(h)), self._heads(self.v_proj(h))
        return self._heads(self.q_proj(h if rows is None else h.index_select(0, rows))), key, value

    def _mlp(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def norm_of(norm: RMSNorm | None) -> Norm:
    """The norm of the heads as operations take it."""
    return NO_NORM if norm is None else Norm(norm.weight, norm.eps)
