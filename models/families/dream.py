"""Dream: Dream-v0-*-7B, Dream-Coder, DiffuCoder. Qwen2 with biases for q, k and v, and shifted outputs."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import fields
from dkv.models.families.base import Family


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`."""
    stated = fields.value(config, "head_dim") is not None
    share = None if stated else fields.share(config, "hidden_size", "num_attention_heads")
    return {
        "num_kv_heads": fields.count(config, "num_attention_heads"),
        "head_dim": fields.count(config, "head_dim", share),
        "max_positions": 32768,
        "norm_eps": 1e-6,
        "tied_head": False,
        "qkv_bias": True,
        "shifted": True,
        "rope_float32": False,
    }


FAMILY = Family(
    name="dream",
    model_types=("dream",),
    architectures=("DreamModel",),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_positions",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tied_head",
    },
    defaults=defaults,
    switches={"hidden_act": "silu", "use_sliding_window": False},
    written={
        "model_type": "Dream",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "sliding_window": None,
        "max_window_layers": 28,
    },
    copies={"bos_token_id": "eos_token_id"},
    usual_ids={152064: {"mask_token_id": 151666, "eos_token_id": 151643, "eot_token_id": 151645}},
    names={
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "layers.{}.attn_norm": "model.layers.{}.input_layernorm",
        "layers.{}.q_proj": "model.layers.{}.self_attn.q_proj",
        "layers.{}.k_proj": "model.layers.{}.self_attn.k_proj",
        "layers.{}.v_proj": "model.layers.{}.self_attn.v_proj",
        "layers.{}.o_proj": "model.layers.{}.self_attn.o_proj",
        "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.gate_proj": "model.layers.{}.mlp.gate_proj",
        "layers.{}.up_proj": "model.layers.{}.mlp.up_proj",
        "layers.{}.down_proj": "model.layers.{}.mlp.down_proj",
    },
)
