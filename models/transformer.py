"""One pre-norm bidirectional transformer for every family; a `ModelSpec` says which."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv import kernels
from dkv.core.kv_cache import KVCache
from dkv.core.varlen import Layout, Narrow, Segments
from dkv.kernels.attention.op import ATTENTION
from dkv.kernels.attention.reference import Rules
from dkv.kernels.attention.shares import Shares
from dkv.kernels.norm.op import RMS_NORM
from dkv.kernels.rope_scatter.op import ROPE_SCATTER
from dkv.kernels.rope_scatter.reference import Norm
from dkv.models.spec import ModelSpec

# Positions of the smallest rotary table: texts that grow from a few slots on do not make it anew each time.
LEAST_ROTARY = 256

# (block, query [..., R, Hq, D], key and value [..., N, Hkv, D]) -> [..., R, Hq, D]
Attend = Callable[["Block", Tensor, Tensor, Tensor], Tensor]
# (number of the layer, query [T, Hq, D], log-sum-exp of its scores [T, Hq], what attention left for `attention_mass`)
Observe = Callable[[int, Tensor, Tensor, Shares], None]


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


class Block(nn.Module):
    """Attention and gated MLP, each on a normed copy that is added to the residual.

    What the MLP gives is handed on beside the residual, as the norm that comes next adds it in the same launch.
    """

    def forward(
        self, x: Tensor, delta: Tensor | None, attend: Attend, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Residual x [..., d] and what is to be added to it -> the same; or [T, d] -> [R, d], for `rows` [R] alone."""
        h, x = self.attn_norm.added(x, delta)
        query, key, value = self._qkv(h, rows)
        if rows is not None:
            x = x.index_select(0, rows)
        h, x = self.mlp_norm.added(x, self.o_proj(attend(self, query, key, value).flatten(-2)))
        return x, self._mlp(h)

    def _heads(self, x: Tensor) -> Tensor:
        *rest, width = x.shape
        return x.view(*rest, width // self.head_dim, self.head_dim)


class Layer(Block):
    """A block whose products are those of the published models, one by one."""

    PARTS = (
        *("attn_norm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
        *("mlp_norm", "gate_proj", "up_proj", "down_proj"),
    )

    def __init__(self, spec: ModelSpec, index: int):
        super().__init__()
        self.index, self.head_dim = index, spec.head_dim
        d, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        bias = spec.linear_bias
        self.attn_norm = RMSNorm(d, spec.norm_eps)
        self.q_proj = nn.Linear(d, q, bias=spec.qkv_bias or bias)
        self.k_proj = nn.Linear(d, kv, bias=spec.qkv_bias or bias)
        self.v_proj = nn.Linear(d, kv, bias=spec.qkv_bias or bias)
        self.o_proj = nn.Linear(q, d, bias=bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.mlp_norm = RMSNorm(d, spec.norm_eps)
        self.gate_proj = nn.Linear(d, spec.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(d, spec.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(spec.intermediate_size, d, bias=bias)

    @classmethod
    def of(cls, block: Block, **products: nn.Module) -> "Layer":
        """A layer with the norms of another block, and these products."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.index, layer.head_dim = block.index, block.head_dim
        for name in cls.PARTS:
            setattr(layer, name, products[name] if name in products else getattr(block, name))
        return layer.train(block.training)

    def _qkv(self, h: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self._heads(self.k_proj(h)), self._heads(self.v_proj(h))
        return self._heads(self.q_proj(h if rows is None else h.index_select(0, rows))), key, value

    def _mlp(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Transformer(nn.Module):
    """A mask predictor: token ids in, a distribution for every slot out."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        # Given its table, as the layer would otherwise load the compiler (2 s) to make one.
        self.embed = nn.Embedding(
            spec.vocab_size, spec.hidden_size, _weight=torch.randn(spec.vocab_size, spec.hidden_size)
        )
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=spec.linear_bias)
        if spec.tied_head:
            self.head.weight = self.embed.weight
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def num_parameters(self) -> int:
        """Weights of all layers, packed ones included."""
        packed = sum(getattr(module, "num_packed", 0) for module in self.modules())
        return packed + sum(p.numel() for p in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # All or nothing: the packed layers, which cannot follow, are asked before the first parameter has gone.
        for module in self.modules():
            if hasattr(module, "check_move"):
                module.check_move(fn)
        return super()._apply(fn, recurse)

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [>= length, D / 2], whose dtype is the one in which q and k are rotated."""
        spec = self.spec
        dtype = torch.promote_types(self.dtype, torch.float32) if spec.rope_float32 else self.dtype
        table = self._rope
        if table is None or table[0].shape[0] < length or table[0].dtype != dtype or table[0].device != self.device:
            rows = max(length, LEAST_ROTARY)
            wide = torch.promote_types(dtype, torch.float32)
            exponent = torch.arange(0, spec.head_dim, 2, device=self.device, dtype=torch.int64).to(wide)
            frequency = 1.0 / spec.rope_theta ** (exponent / spec.head_dim)
            angle = torch.outer(torch.arange(rows, device=self.device, dtype=wide), frequency)
            table = self._rope = (angle.cos().to(dtype), angle.sin().to(dtype))
        return table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of a whole sequence without a buffer; differentiable.

        Args:
            input_ids: [B, S] token ids.
            attention_mask: [B, S], 0 at padding. Padded keys are never attended to and do not
                count in the positions, wherever they stand.

        Returns:
            [B, S, V], not shifted: in a shifted model the logits at slot j predict slot j + 1.
        """
        length = input_ids.shape[1]
        cos, sin = self.rope_tables(length)
        if attention_mask is None:
            cos, sin, visible = cos[:length], sin[:length], None
        else:
            real = attention_mask.bool()
            positions = (real.cumsum(-1) - 1).clamp_(min=0)
            cos, sin, visible = cos[positions], sin[positions], real[:, None, None, :]
        group = self.spec.num_heads // self.spec.num_kv_heads

        def attend(layer: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query = kernels.rotate(kernels.head_norm(query, _head_norm(layer.q_norm)), cos, sin)
            key = kernels.rotate(kernels.head_norm(key, _head_norm(layer.k_norm)), cos, sin)
            key, value = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (key, value))
            out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=visible)
            return out.transpose(1, 2)

        x, delta = self.embed(input_ids), None
        for layer in self.layers:
            x, delta = layer(x, delta, attend)
        return self.head(self.norm.added(x, delta)[0])

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        buffer: KVCache,
        *,
        rows: Tensor | None = None,
        segments: Segments | None = None,
        key_ranges: Tensor | None = None,
        key_gaps: Tensor | None = None,
        outputs: Tensor | None = None,
        output_segments: Segments | None = None,
        observe: Observe | None = None,
        narrow: Narrow | None = None,
        workspace: kernels.Workspace | None = None,
    ) -> Tensor:
        """Recompute the active slots over the buffer: their K and V are written, then attended to.

        Args:
            tokens: [T] ids at the active slots, those of each row of the buffer one after the other; or [B, N].
            positions: shape of tokens, int64, their slots, which are also their rotary positions. The slot after the
                last visible one may be used to fill up.
            buffer: keys and values of all slots; every slot that is seen must have been written.
            rows: int64 [T], the row of the buffer of each; None for tokens [B, N].
            segments: where the entries of each row stand in [T]; None for tokens [B, N].
            key_ranges: [B, 2] first visible slot and the one after the last; None: all slots.
            key_gaps: [B, 2] first slot and the one after the last that are hidden in spite of that; None: none.
            outputs: [R] which of the T need an output, or [B, R] which of the N; None: all.
            output_segments: where those of each row stand in [R]; None for outputs [B, R].
            observe: called in every layer once it has attended; it may keep what it gets. All entries then go through
                all of the last layer, too.
            narrow: lets fewer of the T go on after some layers, and then says which of them need an output; not for
                tokens [B, N]. The others keep the keys and values that they had in the layers after it.
            workspace: scratch to use again between calls.

        Returns:
            Hidden states [R or T, d], or [B, R or N, d], ready for `head`; what fills up means nothing.
        """
        visible = {"key_ranges": key_ranges, "key_gaps": key_gaps}
        if tokens.dim() == 2:
            (batch, n), device = tokens.shape, tokens.device
            rows = torch.arange(batch, device=device).repeat_interleave(n)
            segments, shape = Segments.equal(batch, n, device), tokens.shape
            if outputs is not None:
                shape, output_segments = outputs.shape, Segments.equal(batch, outputs.shape[1], device)
                outputs = (outputs + segments.starts[:, None]).flatten()
            hidden = self.step(
                tokens.flatten(),
                positions.flatten(),
                buffer,
                rows=rows,
                segments=segments,
                **visible,
                outputs=outputs,
                output_segments=output_segments,
                observe=observe,
                workspace=workspace,
            )
            return hidden.view(*shape, -1)
        cos, sin = self.rope_tables(buffer.slots)
        scale, last = self.spec.head_dim**-0.5, self.layers[-1].index
        layout = Layout(positions, rows, segments, outputs, output_segments)
        way, at_outputs = _way(layout, visible, False), False

        # The operations themselves: what the public functions check holds here, in every layer of every step.
        def attend(layer: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            k_buf, v_buf = buffer.layer(layer.index, like=key)
            here, rules, most = way
            norms = _head_norm(layer.q_norm), _head_norm(layer.k_norm)
            query = ROPE_SCATTER(query, key, value, cos, sin, layout.positions, k_buf, v_buf, layout.rows, here, *norms)
            keys, values = buffer.visible(layer.index)
            if observe is None:
                return ATTENTION(query, keys, values, rules, most, scale, False, workspace=workspace)[0]
            shares = Shares()
            out, lse = ATTENTION(query, keys, values, rules, most, scale, True, workspace=workspace, shares=shares)
            observe(layer.index, query, lse, shares)
            return out

        x, delta = self.embed(tokens), None
        for layer in self.layers:
            narrows = narrow is not None and layer.index in narrow.layers
            if layer.index == last and layout.outputs is not None and not narrows and observe is None:
                way, at_outputs = _way(layout, visible, True), True
            x, delta = layer(x, delta, attend, layout.outputs if at_outputs else None)
            if narrows:
                (x, layout), delta = narrow(layer.index, x, delta, layout), None
                way = _way(layout, visible, False)
        if layout.outputs is not None and not at_outputs:
            x, delta = (None if part is None else part.index_select(0, layout.outputs) for part in (x, delta))
        return self.norm.added(x, delta)[0]


def _way(layout: Layout, visible: dict[str, Tensor | None], at_outputs: bool) -> tuple[Tensor | None, Rules, int]:
    """Where the queries of a layer stand, whose they are, and the most of a row."""
    of, places = layout.segments, None
    if at_outputs:
        of, places = layout.output_segments, layout.positions.index_select(0, layout.outputs)
    return places, Rules(of.lengths, query_starts=of.starts, **visible), of.most


NO_NORM = Norm()


def _head_norm(norm: RMSNorm | None) -> Norm:
    return NO_NORM if norm is None else Norm(norm.weight, norm.eps)
