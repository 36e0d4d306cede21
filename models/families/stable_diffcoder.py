"""Stable-DiffCoder (ByteDance Seed): a plain Llama configuration, block-causal in blocks of 4."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import decoder, fields
from dkv.models.families.base import Family


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`. `block_size` is a field of dkv's own."""
    rope = {"rope_theta": fields.rope_theta(config), "max_positions": fields.count(config, "max_position_embeddings")}
    blocks = {"attention": "block", "block_length": 4}
    return {**decoder.defaults(config), **decoder.biases(config), **rope, **blocks}


FAMILY = Family(
    name="stable_diffcoder",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    fields={**decoder.WITH_HEAD_DIM, "attention_bias": "qkv_bias", "block_size": "block_length"},
    defaults=defaults,
    switches={"hidden_act": "silu", "mlp_bias": False},
    written={"model_type": "llama", **decoder.WRITTEN},
    copies={},
    usual_ids={155136: {"mask_token_id": 5, "eos_token_id": 2, "pad_token_id": 1}},
    names=decoder.names(),
    unmarked=True,
)
