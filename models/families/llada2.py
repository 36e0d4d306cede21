"""LLaDA2.0, 2.0-CAP and 2.1 (inclusionAI): Ling 2, block-causal in blocks of 32, half of each head rotated."""

import re
from collections.abc import Mapping
from typing import Any

from dkv.models.families import decoder, experts, fields
from dkv.models.families.base import Family
from dkv.models.mixture import Mixture
from dkv.models.spec import ModelSpec

_LAYER = "model.layers.{}"
# What tells of LLaDA2.2, which inserts and deletes tokens and routes by block: its names, and fields of such tokens.
_NAMES, _TOKENS = r"llada[-_. ]?2[-_.]?2(?!\d)", r"^(delete|insert)_token"


def mixture(config: Mapping) -> Mixture:
    """The experts, in groups; one that is chosen alone has its raw score for weight."""
    layers, chosen = fields.count(config, "num_hidden_layers"), fields.count(config, "num_experts_per_tok")
    dense = fields.value(config, "first_k_dense_replace", 0)
    fits = type(dense) is int and 0 <= dense <= layers
    fields.check(fits, "first_k_dense_replace", dense, f"a whole number in 0..{layers} is needed")
    shared = fields.value(config, "num_shared_experts", 0)
    fields.check(type(shared) is int and shared >= 0, "num_shared_experts", shared, "a whole number or null is needed")
    width = fields.count(config, "moe_intermediate_size")
    return Mixture(
        experts=fields.count(config, "num_experts"),
        chosen=chosen,
        width=width,
        score="sigmoid",
        groups=fields.count(config, "n_group"),
        top_groups=fields.count(config, "topk_group"),
        renormalise=chosen > 1,
        scaling=fields.positive(config, "routed_scaling_factor"),
        bias="choice",
        shared_width=width * shared,
        dense_layers=tuple(range(dense)),
    )


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`; published files leave out `use_qk_norm`, and mean true."""
    stated = [config.get("model_type"), config.get("_name_or_path"), *fields.names(config, "architectures")]
    told = [name for name in stated if isinstance(name, str) and re.search(_NAMES, name, re.IGNORECASE)]
    if told := told + [field for field in config if re.search(_TOKENS, field)]:
        raise ValueError(
            f"this model is LLaDA2.2 ({told[0]}), which dkv does not load; of LLaDA2.x it loads 2.0 and 2.1"
        )
    attention = {"qk_norm": True, "qkv_bias": False, "output_bias": True, "attention": "block", "block_length": 32}
    # Half of a head is rotated here, in no other of these families.
    found = {
        **decoder.defaults({**config, "partial_rotary_factor": 1}),
        **attention,
        "rope_theta": fields.rope_theta(config),
    }
    rotary = int(found["head_dim"] * fields.positive(config, "partial_rotary_factor"))
    return {**found, "rotary_dim": rotary, "max_positions": 16384, "mixture": mixture(config)}


def rest(spec: ModelSpec, found: Mixture) -> dict[str, Any]:
    """As for `experts.more`."""
    return {
        "moe_intermediate_size": found.width,
        "n_group": found.groups,
        "topk_group": found.top_groups,
        "routed_scaling_factor": found.scaling,
        "num_shared_experts": found.shared_width // found.width,
        "first_k_dense_replace": len(found.dense_layers),
    }


def more(spec: ModelSpec) -> dict[str, Any]:
    """As `Family.more`."""
    rotary = spec.rotary_dim or spec.head_dim
    return {"partial_rotary_factor": rotary / spec.head_dim, **experts.more(rest)(spec)}


FAMILY = Family(
    name="llada2",
    model_types=("llada2_moe", "llada2_moe_veomni", "llada21_moe"),
    architectures=("LLaDA2MoeModelLM",),
    fields={**decoder.WITH_HEAD_DIM, "block_size": "block_length"}
    | {"use_qk_norm": "qk_norm", "use_qkv_bias": "qkv_bias", "use_bias": "output_bias"},
    defaults=defaults,
    switches={"hidden_act": "silu", "score_function": "sigmoid", "router_dtype": "fp32", "use_sliding_window": False}
    | dict.fromkeys(("norm_topk_prob", "moe_router_enable_expert_bias", "use_rmsnorm"), True)
    | dict.fromkeys(("norm_head", "norm_softmax", "using_split_qkv_in_self_attention"), False),
    written={"model_type": "llada2_moe", "rope_scaling": None, "initializer_range": 0.02}
    | dict.fromkeys(("attention_dropout", "embedding_dropout", "output_dropout"), 0.0),
    copies={"rotary_dim": "rotary_dim"},
    usual_ids={157184: {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}},
    names={
        "embed": "model.word_embeddings",
        "norm": "model.norm",
        "head": "lm_head",
        "layers.{}.attn_norm": f"{_LAYER}.input_layernorm",
        "layers.{}.mlp_norm": f"{_LAYER}.post_attention_layernorm",
        **{f"layers.{{}}.{x}_proj": f"{_LAYER}.attention.query_key_value" for x in "qkv"},
        "layers.{}.q_norm": f"{_LAYER}.attention.query_layernorm",
        "layers.{}.k_norm": f"{_LAYER}.attention.key_layernorm",
        "layers.{}.o_proj": f"{_LAYER}.attention.dense",
        **{f"layers.{{}}.{part}": f"{_LAYER}.mlp.{part}" for part in experts.MLP},
        **experts.names("shared_experts"),
    },
    more=more,
)
