"""LLaDA: GSAI-ML/LLaDA-8B-*, LLaDA-1.5, iLLaDA, and the language model of MMaDA."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import fields
from dkv.models.families.base import Family

_IDS = {"mask_token_id": 126336, "eos_token_id": 126081, "eot_token_id": 126348}


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`; but the size of the table is `vocab_size`, where the published class has GPT-2's."""
    heads, hidden = fields.count(config, "n_heads"), fields.count(config, "d_model")
    # Left out, the bias of the norms follows that of the projections.
    bias = fields.flag(config, "bias_for_layer_norm", fields.flag(config, "include_bias", False))
    fields.only({"bias_for_layer_norm": False}, {"bias_for_layer_norm": bias})
    single = fields.flag(config, "multi_query_attention", False)
    wanted = 1 if single else heads
    found = fields.count(config, "n_kv_heads", wanted)
    if fields.value(config, "multi_query_attention") is not None and found != wanted:
        raise ValueError(
            f"the configuration has n_kv_heads={found!r}, but multi_query_attention={single!r} means {wanted}: "
            "set one of them to null"
        )
    return {
        "num_kv_heads": wanted,
        "head_dim": fields.share(config, "d_model", "n_heads"),
        "intermediate_size": hidden * fields.count(config, "mlp_ratio", 4),
        "max_positions": 1024,
        "norm_eps": 1e-5,
        "qkv_bias": False,
        "linear_bias": False,
        "tied_head": True,
        "rope_float32": True,
    }


FAMILY = Family(
    name="llada",
    model_types=("llada", "mmada"),
    architectures=("LLaDAModelLM", "MMadaModelLM"),
    fields={
        "vocab_size": "vocab_size",
        "embedding_size": "vocab_size",
        "d_model": "hidden_size",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "n_kv_heads": "num_kv_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_positions",
        "rms_norm_eps": "norm_eps",
        "include_qkv_bias": "qkv_bias",
        "include_bias": "linear_bias",
        "weight_tying": "tied_head",
        "rope_full_precision": "rope_float32",
    },
    defaults=defaults,
    switches={"block_type": "llama", "block_group_size": 1, "activation_type": "silu", "layer_norm_type": "rms"}
    | dict.fromkeys(("rope", "layer_norm_with_affine"), True)
    | dict.fromkeys(("alibi", "bias_for_layer_norm", "attention_layer_norm", "input_emb_norm", "scale_logits"), False),
    written={"model_type": "llada", "flash_attention": False, "multi_query_attention": None}
    | dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.0),
    copies={},
    usual_ids={126464: _IDS, 134656: _IDS, 155136: {"mask_token_id": 5, "eos_token_id": 2, "pad_token_id": 1}},
    names={
        "embed": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
        "layers.{}.attn_norm": "model.transformer.blocks.{}.attn_norm",
        "layers.{}.q_proj": "model.transformer.blocks.{}.q_proj",
        "layers.{}.k_proj": "model.transformer.blocks.{}.k_proj",
        "layers.{}.v_proj": "model.transformer.blocks.{}.v_proj",
        "layers.{}.o_proj": "model.transformer.blocks.{}.attn_out",
        "layers.{}.mlp_norm": "model.transformer.blocks.{}.ff_norm",
        "layers.{}.gate_proj": "model.transformer.blocks.{}.ff_proj",
        "layers.{}.up_proj": "model.transformer.blocks.{}.up_proj",
        "layers.{}.down_proj": "model.transformer.blocks.{}.ff_out",
    },
)
