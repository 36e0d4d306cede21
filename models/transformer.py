"""One pre-norm transformer for every family; a `ModelSpec` says which."""

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
from dkv.kernels.rope_scatter.op import ROPE_SCATTER
from dkv.models.layers import Block, Layer, Network, RMSNorm, norm_of
from dkv.models.rotary import frequencies
from dkv.models.spec import ModelSpec

# Positions of the smallest rotary table: texts that grow from a few slots on do not make it anew each time.
LEAST_ROTARY = 256

# (number of the layer, query [T, Hq, D], log-sum-exp of its scores [T, Hq], what attention left instead of that)
Observe = Callable[[int, Tensor, Tensor | None, Shares], None]


class Transformer(Network):
    """A mask predictor: token ids in, a distribution for every slot out."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=spec.linear_bias)
        if spec.tied_head:
            self.head.weight = self.embed.weight
        self._rope: tuple[Tensor, ...] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # All or nothing: the packed layers, which cannot follow, are asked before the first parameter has gone.
        for module in self.modules():
            if hasattr(module, "check_move"):
                module.check_move(fn)
        return super()._apply(fn, recurse)

    def rope_tables(self, length: int) -> tuple[Tensor, ...]:
        """What positions do, by position: cos and sin [>= length, w], of 2 w features that are rotated, in the dtype in
        which q and k are; and, where some of the `length` positions scale their queries, by what, [>= length].
        """
        spec = self.spec
        dtype = torch.promote_types(self.dtype, torch.float32) if spec.rope_float32 else self.dtype
        table = self._rope
        if table is None or table[0].shape[0] < length or table[0].dtype != dtype or table[0].device != self.device:
            rows = max(length, LEAST_ROTARY)
            wide = torch.promote_types(dtype, torch.float32)
            turns = frequencies(spec.rope_theta, spec.rotary_dim or spec.head_dim, self.device, wide)
            if spec.rope is not None:
                turns = spec.rope.changed(turns, spec.rope_theta)
            angle = torch.outer(torch.arange(rows, device=self.device, dtype=wide), turns)
            table = self._rope = (angle.cos().to(dtype), angle.sin().to(dtype))
            if spec.query_scale is not None:
                table = self._rope = (*table, spec.query_scale.table(rows, self.device).to(self.dtype))
        return table if spec.query_scale is not None and length > spec.query_scale.original else table[:2]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, block_ids: Tensor | None = None
    ) -> Tensor:
        """Logits of a whole sequence without a buffer; differentiable.

        Args:
            input_ids: [B, S] token ids.
            attention_mask: [B, S], 0 at padding. Padded keys are never attended to and do not
                count in the positions, wherever they stand.
            block_ids: int64 [B, S], numbers of blocks: a slot sees those whose number is at most its own. The numbers
                of the slots give a causal model. None is what the spec says: with `attention="block"` blocks of
                `block_length`, counted from slot 0, padding included; else every slot sees all.

        Returns:
            [B, S, V], not shifted: in a shifted model the logits at slot j predict slot j + 1.

        Raises:
            ValueError: `block_ids` of another shape than the tokens, or missing where the spec does not say how long
                its blocks are.
        """
        length, real = input_ids.shape[1], None if attention_mask is None else attention_mask.bool()
        places = slice(length) if real is None else (real.cumsum(-1) - 1).clamp_(min=0)
        cos, sin, *scales = (table[places] for table in self.rope_tables(length))
        visible = self._visible(input_ids, real, block_ids)
        group = self.spec.num_heads // self.spec.num_kv_heads

        def attend(layer: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query = kernels.rotate(kernels.head_norm(query, norm_of(layer.q_norm)), cos, sin)
            key = kernels.rotate(kernels.head_norm(key, norm_of(layer.k_norm)), cos, sin)
            for scale in scales:
                query = query * scale[..., None, None]
            key, value = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (key, value))
            out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=visible)
            return out.transpose(1, 2)

        x, delta = self.embed(input_ids), None
        for layer in self.layers:
            x, delta = layer(x, delta, attend)
        return self.head(self.norm.added(x, delta)[0])

    def _visible(self, input_ids: Tensor, real: Tensor | None, block_ids: Tensor | None) -> Tensor | None:
        """bool [B or 1, 1, S or 1, S], whether a slot sees another; None: each sees all."""
        spec, visible = self.spec, None if real is None else real[:, None, None, :]
        if block_ids is not None and block_ids.shape != input_ids.shape:
            raise ValueError(f"block_ids must be {list(input_ids.shape)}, as the tokens, got {list(block_ids.shape)}")
        if block_ids is None and spec.attention != "block":
            return visible
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        if block_ids is None:
            if spec.block_length is None:
                raise ValueError("block_ids are needed: the spec of this model does not say how long its blocks are")
            block_ids = (slots // spec.block_length)[None]
        before = block_ids[:, None, None, :] <= block_ids[:, None, :, None]
        # Padding sees itself where it would see nothing.
        return before if visible is None else before & visible | (slots[:, None] == slots)

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
        ends: Tensor | None = None,
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
            ends: int64 [T], by active slot: it sees the slots before this one; None: all of these. Not for tokens
                [B, N].
            outputs: [R] which of the T need an output, or [B, R] which of the N; None: all.
            output_segments: where those of each row stand in [R]; None for outputs [B, R].
            observe: called in every layer once it has attended; it may keep what it gets. All entries then attend in
                the last layer, too, whatever needs an output.
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
        cos, sin, *scales = self.rope_tables(buffer.slots)
        scale, last = self.spec.head_dim**-0.5, self.layers[-1].index
        layout = Layout(positions, rows, segments, outputs, output_segments, ends)
        way, at_outputs = _way(layout, visible, scales, False), False
        every = observe is not None

        # The operations themselves: what the public functions check holds here, in every layer of every step.
        def attend(layer: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            k_buf, v_buf = buffer.layer(layer.index, like=key)
            here, rules, most, times = way
            norms = norm_of(layer.q_norm), norm_of(layer.k_norm)
            query = ROPE_SCATTER(query, key, value, cos, sin, layout.positions, k_buf, v_buf, layout.rows, here, *norms)
            query = query if times is None else query * times
            keys, values = buffer.visible(layer.index)
            if not every:
                return ATTENTION(query, keys, values, rules, most, scale, False, workspace=workspace)[0]
            shares = Shares()
            out, lse = ATTENTION(query, keys, values, rules, most, scale, True, workspace=workspace, shares=shares)
            observe(layer.index, query, lse, shares)
            return out.index_select(0, layout.outputs) if at_outputs else out

        x, delta = self.embed(tokens), None
        for layer in self.layers:
            narrows = narrow is not None and layer.index in narrow.layers
            if layer.index == last and layout.outputs is not None and not narrows:
                at_outputs = True
                way = way if every else _way(layout, visible, scales, True)
            x, delta = layer(x, delta, attend, layout.outputs if at_outputs else None, every)
            if narrows:
                (x, layout), delta = narrow(layer.index, x, delta, layout), None
                way = _way(layout, visible, scales, False)
        if layout.outputs is not None and not at_outputs:
            x, delta = (None if part is None else part.index_select(0, layout.outputs) for part in (x, delta))
        return self.norm.added(x, delta)[0]


def _way(
    layout: Layout, visible: dict[str, Tensor | None], scales: list[Tensor], at_outputs: bool
) -> tuple[Tensor | None, Rules, int, Tensor | None]:
    """Where the queries of a layer stand, whose they are, the most of a row, and what they are multiplied by."""
    of, places, ends = layout.segments, None, layout.ends
    if at_outputs:
        of, places = layout.output_segments, layout.positions.index_select(0, layout.outputs)
        ends = None if ends is None else ends.index_select(0, layout.outputs)
    where = layout.positions if places is None else places
    times = scales[0].index_select(0, where)[:, None, None] if scales else None
    return places, Rules(of.lengths, query_starts=of.starts, query_ends=ends, **visible), of.most, times
