"""What DiffusionGemma needs to be told, as data: its layers are of two kinds, so `ModelSpec` cannot say it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GemmaLayer:
    """What one layer has of its own.

    Attributes:
        head_dim, num_kv_heads: of its attention.
        window: slots that a slot of the text sees, itself included; None: all before it, and values are made from the
            raw keys, as there is no projection for them.
        rope_theta: base of the rotary frequencies.
        rotated: share of the head that turns, from its first features on; frequencies are those of the whole head.
    """

    head_dim: int
    num_kv_heads: int
    window: int | None
    rope_theta: float
    rotated: float = 1.0


@dataclass(frozen=True)
class GemmaSpec:
    """Sizes and ids of a DiffusionGemma model; its text part alone.

    Attributes:
        layers: one entry a layer.
        num_experts, chosen_experts, expert_size: of every layer's mixture, which stands beside a dense MLP of
            `intermediate_size`.
        softcap: logits l become softcap tanh(l / softcap).
        block_length: slots of a canvas.
        eos_token_id: the first of `ends`, the ids that end a text; None: there are none.
        generation: settings of the folder's `generation_config.json`, the defaults of a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[GemmaLayer, ...]
    intermediate_size: int
    num_experts: int
    chosen_experts: int
    expert_size: int
    norm_eps: float
    softcap: float
    block_length: int
    max_positions: int
    ends: tuple[int, ...] = ()
    pad_token_id: int | None = 0
    vocab_limit: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # As `ModelSpec` has them: no slot is a mask, outputs are those of their own slots, and the experts of a layer are
    # packed in the file as well.
    mask_token_id: None = None
    mixture: None = None
    has_dense_layers: bool = True
    eot_token_id: None = None
    shifted: bool = False
    tied_head: bool = True
    attention: str = "prefix_causal"
    blocks_from_prompt: bool = True

    @property
    def eos_token_id(self) -> int | None:
        return self.ends[0] if self.ends else None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_kv_heads(self) -> int:
        return min(layer.num_kv_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        return min(layer.head_dim for layer in self.layers)
