"""SDAR (JetLM) and TraDo (Gen-Verse), the dense ones: Qwen3, block-causal in blocks of 4, or as many as it says."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import decoder, fields
from dkv.models.families.base import Family


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`; `block_size` is that of the published `generate.py`."""
    rope = {"rope_theta": fields.rope_theta(config)}
    blocks = {"attention": "block", "block_length": 4}
    return {**decoder.defaults(config, head_dim=128), **decoder.biases(config), **rope, **blocks, "qk_norm": True}


FAMILY = Family(
    name="sdar",
    model_types=("sdar",),
    architectures=("SDARForCausalLM",),
    fields={**decoder.WITH_HEAD_DIM, "attention_bias": "qkv_bias", "block_size": "block_length"},
    defaults=defaults,
    switches=decoder.SWITCHES,
    written={"model_type": "sdar", **decoder.WRITTEN},
    copies={"bos_token_id": "eos_token_id"},
    usual_ids={151936: {"mask_token_id": 151669, "eos_token_id": 151643, "eot_token_id": 151645}},
    names=decoder.names(),
)
