"""DiffusionGemma: one set of weights that reads text from left to right, and denoises a canvas that sees it all.

The rules are those of `DiffusionGemmaForBlockDiffusion` of transformers 5.24. Rows stand in the buffer from slot 0 on,
without padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.core.kv_cache import KVCache
from dkv.kernels.attention.op import ATTENTION
from dkv.kernels.attention.reference import Rules
from dkv.kernels.rope_scatter.op import ROPE_SCATTER
from dkv.kernels.rope_scatter.reference import Norm as HeadNorm
from dkv.models.gemma_layer import Attention, Layer, Mlp, Norm, SelfConditioning
from dkv.models.gemma_spec import GemmaLayer, GemmaSpec
from dkv.models.layers import Network

# Tokens of a row that are encoded at once, which bounds the mask of a long prompt.
PIECE = 1024
# Heads are normed before they are rotated.
NO_NORM = HeadNorm()


class Gemma(Network):
    """The text part of a DiffusionGemma model: `encode` what is known, then `decode` a canvas as often as needed."""

    def __init__(self, spec: GemmaSpec):
        super().__init__(spec)
        self.self_conditioning = SelfConditioning(spec)
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.num_layers))
        self.encoder_scalars = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in spec.layers)
        self.norm = Norm(spec.hidden_size, spec.norm_eps)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self._rope: dict[tuple, tuple[Tensor, Tensor]] = {}

    def join_(self) -> None:
        """Join the weights that multiply the same states: fewer products, and larger ones. Names are then others."""
        for module in self.modules():
            if isinstance(module, Attention | Mlp):
                module.join_()

    def rope_tables(self, kind: GemmaLayer, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [>= length, D / 2] of a kind of layer; a pair that does not turn has frequency 0."""
        key = (kind, self.device)
        if key not in self._rope or len(self._rope[key][0]) < length:
            pair = torch.arange(kind.head_dim // 2, device=self.device)
            turns = pair < int(kind.rotated * kind.head_dim // 2)
            frequency = turns / kind.rope_theta ** (2 * pair / kind.head_dim)
            angle = torch.outer(torch.arange(length, device=self.device).float(), frequency)
            self._rope[key] = (angle.cos(), angle.sin())
        return self._rope[key]

    def encode(self, ids: Tensor, starts: Tensor, buffer: KVCache) -> Tensor:
        """Read tokens from left to right: their keys and values are written.

        Args:
            ids: [B, N], for every row of the buffer; what fills up a shorter row may be any ids, and what it writes
                behind the row is to be written over before it is seen.
            starts: int64 [B], the slot of the first token of each row; all before it have been written.

        Returns:
            Hidden states [B, N, d] behind the final norm.
        """
        pieces = ids.split(PIECE, 1)
        found = [self._encode(piece, starts + i * PIECE, buffer) for i, piece in enumerate(pieces)]
        return torch.cat(found, 1)

    def _encode(self, ids: Tensor, starts: Tensor, buffer: KVCache) -> Tensor:
        batch, n = ids.shape
        # What fills up a row may lie behind the buffer: all of that goes to the spare slot.
        positions = (starts[:, None] + torch.arange(n, device=ids.device)).clamp(max=buffer.room)
        since = positions[:, :, None] - torch.arange(buffer.room, device=ids.device)
        rules = {}
        for window in self._windows:
            mask = since >= 0 if window is None else (since >= 0) & (since < window)
            rules[window] = Rules(mask=mask, key_ranges=_ranges(starts, n, window).clamp(max=buffer.room))

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.unflatten(0, (batch, n)) for x in (query, key, value))
            query = self._write(index, query, key, value, positions, buffer, None)
            visible = rules[self.spec.layers[index].window]
            return ATTENTION(query, *buffer.visible(index), visible, n, 1.0, False)[0].flatten(0, 1)

        x = self.embed(ids.flatten()) * self._scale
        for layer, scalar in zip(self.layers, self.encoder_scalars, strict=True):
            x = layer(x, attend, scalar)
        return self.norm(x).unflatten(0, (batch, n))

    def decode(self, canvas: Tensor, rows: Tensor, starts: Tensor, buffer: KVCache, soft: Tensor | None) -> Tensor:
        """Read canvases, which see all that was encoded and themselves; what they write is written over next time.

        Args:
            canvas: [R, C] ids of some rows, which stand behind what was encoded.
            rows: int64 [R], ascending, which rows of the buffer these are.
            starts: int64 [B], the first slot of the canvas of every row of the buffer.
            soft: [R, C, d] `soft` embeddings of what the last step thought; None in the first step.

        Returns:
            Hidden states [R, C, d], ready for `logits`.
        """
        r, c = canvas.shape
        index = torch.full_like(starts, -1).index_copy_(0, rows, torch.arange(r, device=rows.device))
        first, lengths = index.clamp(min=0) * c, (index >= 0) * c
        positions = (starts.index_select(0, rows)[:, None] + torch.arange(c, device=rows.device)).flatten()
        owners = rows.repeat_interleave(c)
        rules = {window: Rules(lengths, _ranges(starts, c, window), query_starts=first) for window in self._windows}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query = self._write(layer, query, key, value, positions, buffer, owners)
            return ATTENTION(query, *buffer.visible(layer), rules[self.spec.layers[layer].window], c, 1.0, False)[0]

        x = self.embed(canvas.flatten()) * self._scale
        x = self.self_conditioning(x, None if soft is None else soft.flatten(0, 1))
        for layer in self.layers:
            x = layer(x, attend, layer.layer_scalar)
        return self.norm(x).unflatten(0, (r, c))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> float32 [..., V], capped."""
        return self._capped(self.head(hidden))

    def own_logits(self, hidden: Tensor) -> Tensor:
        """`logits`, of the ids that this process has, from `head.first` on, in a model that several share."""
        return self._capped(F.linear(hidden, self.head.weight))

    def _capped(self, raw: Tensor) -> Tensor:
        found = raw.to(torch.promote_types(raw.dtype, torch.float32))
        # In place, as there are many: with the vocabulary of the published model 256 MiB for a canvas.
        return found.div_(self.spec.softcap).tanh_() * self.spec.softcap

    def soft(self, probabilities: Tensor) -> Tensor:
        """The mean embedding under probabilities [..., V]: [..., d]. Of the own ids in a model that several share."""
        mean = probabilities.to(self.dtype) @ self.embed.weight
        return (mean if self.ranks is None else self.ranks.sum_(mean)) * self._scale

    @property
    def _scale(self) -> Tensor:
        # Rounded to the dtype of the weights, as published.
        return torch.tensor(self.spec.hidden_size**0.5, dtype=self.dtype)

    @property
    def _windows(self) -> set[int | None]:
        return {kind.window for kind in self.spec.layers}

    def _write(self, index, query, key, value, positions, buffer, rows) -> Tensor:
        """Write rotated keys, and values, into the buffer; returns the rotated queries."""
        tables = self.rope_tables(self.spec.layers[index], buffer.slots)
        pair = buffer.layer(index, like=key)
        return ROPE_SCATTER(query, key, value, *tables, positions, *pair, rows, None, NO_NORM, NO_NORM)


def _ranges(starts: Tensor, n: int, window: int | None) -> Tensor:
    """The keys [B, 2] that any of n slots from `starts` [B] on may see: the last window - 1 before them, and all n."""
    first = torch.zeros_like(starts) if window is None else (starts - (window - 1)).clamp(min=0)
    return torch.stack((first, starts + n), 1)
