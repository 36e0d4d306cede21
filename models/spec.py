"""What distinguishes one diffusion language model from the next, as data."""

import math
from dataclasses import dataclass, field

from dkv.models.mixture import Mixture
from dkv.models.rotary import Proportional, QueryScale, Yarn

ATTENTIONS = ("full", "block", "prefix_causal")


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a transformer that fills masks.

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
    # What ends a turn of a talk, where that is another token than the end of a text. Nothing is computed with it.
    eot_token_id: int | None = field(default=None, compare=False)
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    # The output at a slot predicts the next slot (Dream), not its own (LLaDA).
    shifted: bool = False
    # What a slot sees: "full", all; "block", its own block and all before it; "prefix_causal", its own block while that
    # is filled, and what is before it as a causal model reads that.
    attention: str = "full"
    # Slots of a block; None: full attention, or the configuration does not say.
    block_length: int | None = None
    # Blocks are counted from the end of the prompt; else from slot 0.
    blocks_from_prompt: bool = False
    # The first slot of a block is filled by the pass that stores the block before it.
    seeded: bool = False
    # The product behind the attention has a bias; `linear_bias` gives one to all.
    output_bias: bool = False
    # Queries, keys and values are held between minus this and this, before the head norms; None: they are not.
    clip_qkv: float | None = None
    # So many features of a head are rotated, its first ones; None: all.
    rotary_dim: int | None = None
    # What is done to the rotary frequencies; None: nothing.
    rope: Yarn | Proportional | None = None
    # What rotated queries are multiplied by, which grows with their position; None: nothing.
    query_scale: QueryScale | None = None
    # The experts that stand in place of the MLP; None: all layers have the one of `intermediate_size`.
    mixture: Mixture | None = None
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
        if self.rotary_dim is None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim must be even and in 2..{self.head_dim}, the head size, or None, got {self.rotary_dim}"
            )
        if isinstance(self.rope, Yarn) and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for YaRN, got {self.rope_theta}")
        if self.clip_qkv is not None and not 0 < self.clip_qkv < math.inf:
            raise ValueError(f"clip_qkv must be a finite number above 0, or None, got {self.clip_qkv}")
        if self.mixture is not None and not set(self.mixture.dense_layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"dense_layers of the mixture must be in 0..{self.num_layers - 1}, got {self.mixture.dense_layers}"
            )
        self._check_blocks()
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id ({self.mask_token_id}) is outside the vocabulary of {self.vocab_size}")
        if self.vocab_limit is not None and not 1 <= self.vocab_limit <= self.vocab_size:
            raise ValueError(f"vocab_limit ({self.vocab_limit}) is outside 1..{self.vocab_size}, the vocabulary")

    @property
    def has_dense_layers(self) -> bool:
        """Whether a layer has an MLP of `intermediate_size`."""
        return self.mixture is None or bool(self.mixture.dense_layers)

    def _check_blocks(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, got {self.attention!r}")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, or None, got {self.block_length}")
        if self.attention == "prefix_causal" and self.block_length is None:
            raise ValueError("attention='prefix_causal' needs a block_length")
        if self.attention == "full" and (self.block_length or self.blocks_from_prompt or self.seeded):
            raise ValueError(
                "block_length, blocks_from_prompt and seeded need attention='block' or 'prefix_causal', not 'full'"
            )
