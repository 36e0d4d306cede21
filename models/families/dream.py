"""Dream: Dream-v0-*-7B, Dream-Coder, DiffuCoder. Qwen2 with biases for q, k and v, and shifted outputs."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import decoder
from dkv.models.families.base import Family


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`."""
    return {**decoder.defaults(config), "qkv_bias": True, "shifted": True}


FAMILY = Family(
    name="dream",
    model_types=("dream",),
    architectures=("DreamModel",),
    fields=decoder.FIELDS,
    defaults=defaults,
    switches=decoder.SWITCHES,
    written={"model_type": "Dream", **decoder.WRITTEN},
    copies={"bos_token_id": "eos_token_id"},
    usual_ids={152064: {"mask_token_id": 151666, "eos_token_id": 151643, "eot_token_id": 151645}},
    names=decoder.names(),
)
