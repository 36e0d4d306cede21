"""Fast-dLLM v2 (NVIDIA): Qwen2.5, shifted and block-causal.

The pass that stores a block gives the first token of the next one.
"""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import decoder, fields
from dkv.models.families.base import Family

_IDS = {"mask_token_id": 151665, "eos_token_id": 151645}


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`."""
    blocks = {"attention": "block", "block_length": 32, "shifted": True, "seeded": True}
    return {**decoder.defaults(config), "rope_theta": fields.rope_theta(config), "qkv_bias": True, **blocks}


FAMILY = Family(
    name="fast_dllm_v2",
    model_types=("fast_dllm_qwen",),
    architectures=("Fast_dLLM_QwenForCausalLM",),
    fields={**decoder.FIELDS, "bd_size": "block_length"},
    defaults=defaults,
    switches=decoder.SWITCHES,
    written={"model_type": "Fast_dLLM_Qwen", **decoder.WRITTEN},
    copies={"bos_token_id": "pad_token_id"},
    usual_ids={151936: _IDS, 152064: _IDS},
    names=decoder.names(),
)
