"""What distinguishes one diffusion language model from the next, as data."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a bidirectional transformer.

    Sizes are numbers of features, heads, layers or token ids; `rope_theta` is the base of the
    rotary frequencies and `norm_eps` the constant under the root of every RMS norm.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    mask_token_id: int
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    # The output at a slot predicts the next slot (Dream), not its own (LLaDA).
    shifted: bool = False
    # Rotate in at least float32 (LLaDA), or in the dtype of the activations (Dream).
    rope_float32: bool = True
    # Ids from here on have no text in the tokenizer that comes with the model; None: all have, or it is not known.
    vocab_limit: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id ({self.mask_token_id}) is outside the vocabulary of {self.vocab_size}")
        if self.vocab_limit is not None and not 1 <= self.vocab_limit <= self.vocab_size:
            raise ValueError(f"vocab_limit ({self.vocab_limit}) is outside 1..{self.vocab_size}, the vocabulary")
