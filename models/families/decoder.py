"""What the families have in common whose body is a decoder of transformers: Llama, Qwen2, Qwen3, Ministral 3."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import fields

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
}
# Besides, where the size of a head is a field.
WITH_HEAD_DIM = {**FIELDS, "head_dim": "head_dim"}
SWITCHES = {"hidden_act": "silu", "use_sliding_window": False}
WRITTEN = {"attention_dropout": 0.0, "initializer_range": 0.02, "sliding_window": None, "max_window_layers": 28}


def defaults(config: Mapping, head_dim: int | None = None) -> dict[str, Any]:
    """As `Family.defaults`; `head_dim` is that of a file that leaves it out, None: its share of the hidden size."""
    kinds = [kind for kind in fields.names(config, "layer_types") if kind != "full_attention"]
    fields.check(not kinds, "layer_types", kinds, "only 'full_attention' is implemented")
    share = fields.value(config, "partial_rotary_factor", 1)
    fields.check(share == 1, "partial_rotary_factor", share, "only 1 is implemented in this family")
    if head_dim is None and fields.value(config, "head_dim") is None:
        head_dim = fields.share(config, "hidden_size", "num_attention_heads")
    return {
        "num_kv_heads": fields.count(config, "num_attention_heads"),
        "head_dim": fields.count(config, "head_dim", head_dim),
        "max_positions": 32768,
        "norm_eps": 1e-6,
        "tied_head": False,
        "rope_float32": False,
    }


def biases(config: Mapping) -> dict[str, bool]:
    """The biases of the four products of the attention, where `attention_bias` stands for all."""
    found = fields.flag(config, "attention_bias", False)
    return {"qkv_bias": found, "output_bias": found}


def names(root: str = "model", head: str = "lm_head") -> dict[str, str]:
    """The tensors below `root`, and the head."""
    layer = f"{root}.layers.{{}}"
    attention = {
        part: f"{layer}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    }
    mlp = {part: f"{layer}.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    norms = {"attn_norm": f"{layer}.input_layernorm", "mlp_norm": f"{layer}.post_attention_layernorm"}
    inside = {f"layers.{{}}.{part}": name for part, name in (attention | mlp | norms).items()}
    return {"embed": f"{root}.embed_tokens", "norm": f"{root}.norm", "head": head, **inside}
