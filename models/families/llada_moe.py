"""LLaDA-MoE: inclusionAI/LLaDA-MoE-7B-A1B. OLMoE with norms of heads, bidirectional, in the loop of LLaDA."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import decoder, experts, fields
from dkv.models.families.base import Family
from dkv.models.mixture import Mixture
from dkv.models.spec import ModelSpec


def mixture(config: Mapping) -> Mixture:
    """`norm_topk_prob` is not read, as the published class never renormalises; a bias stays in the weights."""
    layers = fields.count(config, "num_hidden_layers")
    pattern = fields.value(config, "moe_layer_freq", [1] * layers)
    fits = isinstance(pattern, list | tuple) and len(pattern) == layers and all(x in (0, 1) for x in pattern)
    fields.check(fits, "moe_layer_freq", pattern, f"a list of {layers} numbers, 0 or 1, or null is needed")
    shared = fields.optional(fields.count)(config, "shared_expert_intermediate_size")
    return Mixture(
        experts=fields.count(config, "num_experts"),
        chosen=fields.count(config, "num_experts_per_tok"),
        width=fields.count(config, "expert_intermediate_size"),
        bias="weights" if fields.flag(config, "moe_router_enable_expert_bias", False) else None,
        shared_width=shared or 0,
        dense_layers=tuple(i for i, sparse in enumerate(pattern) if not sparse),
    )


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`; without a dense layer the width of one may be missing."""
    scaling = fields.value(config, "routed_scaling_factor", 1)
    fields.check(scaling == 1, "routed_scaling_factor", scaling, "only 1 is implemented")
    found = mixture(config)
    sizes = {"norm_eps": 1e-5, "qk_norm": True} | ({} if found.dense_layers else {"intermediate_size": found.width})
    rope = {"rope_theta": fields.rope_theta(config)}
    return {**decoder.defaults(config), **decoder.biases(config), **sizes, **rope, "mixture": found}


def rest(spec: ModelSpec, found: Mixture) -> dict[str, Any]:
    """As for `experts.more`."""
    return {
        "expert_intermediate_size": found.width,
        "shared_expert_intermediate_size": found.shared_width or None,
        "moe_router_enable_expert_bias": found.bias is not None,
        "moe_layer_freq": [int(i not in found.dense_layers) for i in range(spec.num_layers)],
    }


FAMILY = Family(
    name="llada_moe",
    model_types=("llada", "lladamoe", "llada_moe"),
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    fields={k: v for k, v in decoder.FIELDS.items() if v != "intermediate_size"}
    | {"dense_intermediate_size": "intermediate_size", "attention_bias": "qkv_bias"}
    | {"qk_layernorm": "qk_norm", "clip_qkv": "clip_qkv"},
    defaults=defaults,
    switches={"hidden_act": "silu", "moe_router_score_function": "softmax"}
    | dict.fromkeys(("router_num_group", "router_topk_group"), None),
    written={"model_type": "llada", "attention_dropout": 0.0, "initializer_range": 0.02, "partial_rotary_factor": 1}
    | {"routed_scaling_factor": 1, "norm_topk_prob": None, "rope_scaling": None},
    copies={},
    usual_ids={157184: {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}},
    names={
        **decoder.names(),
        **experts.names("shared_expert"),
        "layers.{}.experts.router.expert_bias": "model.layers.{}.mlp.expert_bias",
    },
    more=experts.more(rest),
)
