"""A2D and Tiny-A2D (dllm): Qwen3, Qwen2 or Llama, read bidirectionally (MDLM) or block-causally (BD3LM).

Nothing in a published file says which: with `block_size`, a field of dkv's own, which `attention_block` of `dkv.load`
fills in, a model is block-causal, its blocks counted from the end of the prompt.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dkv.models.families import decoder, fields
from dkv.models.families.base import Family


def _defaults(body: Callable[[Mapping], dict[str, Any]]) -> Callable[[Mapping], dict[str, Any]]:
    def defaults(config: Mapping) -> dict[str, Any]:
        blocks = fields.value(config, "block_size") is not None
        pattern = {"attention": "block" if blocks else "full", "block_length": None, "blocks_from_prompt": blocks}
        return {**body(config), "rope_theta": fields.rope_theta(config), **pattern}

    return defaults


def _qwen3(config: Mapping) -> dict[str, Any]:
    return {**decoder.defaults(config, head_dim=128), **decoder.biases(config), "qk_norm": True}


def _qwen2(config: Mapping) -> dict[str, Any]:
    return {**decoder.defaults(config), "qkv_bias": True}


def _llama(config: Mapping) -> dict[str, Any]:
    return {**decoder.defaults(config), **decoder.biases(config), "max_positions": 2048}


def _family(kind: str, architecture: str, defaults: Callable, **changes: Any) -> Family:
    shared = {
        "fields": {**decoder.WITH_HEAD_DIM, "attention_bias": "qkv_bias"},
        "switches": decoder.SWITCHES,
        "written": {"model_type": kind, **decoder.WRITTEN},
        "copies": {},
        "usual_ids": {},
        "names": decoder.names(),
        **changes,
    }
    shared["fields"] = {**shared["fields"], "block_size": "block_length"}
    return Family(kind, (kind,), (architecture,), defaults=_defaults(defaults), **shared)


FAMILIES = (
    _family("a2d-qwen3", "A2DQwen3LMHeadModel", _qwen3),
    # Its biases are no switch.
    _family("a2d-qwen2", "A2DQwen2LMHeadModel", _qwen2, fields=decoder.FIELDS),
    _family("a2d-llama", "A2DLlamaLMHeadModel", _llama, switches={"hidden_act": "silu", "mlp_bias": False}),
)
