"""SDAR-MoE (JetLM/SDAR-30B-A3B): Qwen3-MoE, block-causal as the dense SDAR."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dkv.models.families import decoder, experts, fields, sdar
from dkv.models.mixture import Mixture
from dkv.models.spec import ModelSpec


def mixture(config: Mapping) -> Mixture:
    """Layers are dense that `mlp_only_layers` names, and those between every `decoder_sparse_step`."""
    layers, step = fields.count(config, "num_hidden_layers"), fields.count(config, "decoder_sparse_step", 1)
    named = fields.value(config, "mlp_only_layers", [])
    fits = isinstance(named, list | tuple) and all(type(i) is int and 0 <= i < layers for i in named)
    fields.check(fits, "mlp_only_layers", named, f"a list of numbers in 0..{layers - 1} or null is needed")
    return Mixture(
        # Its second name is that of transformers 5.
        experts=fields.count(config, "num_experts", fields.value(config, "num_local_experts")),
        chosen=fields.count(config, "num_experts_per_tok"),
        width=fields.count(config, "moe_intermediate_size"),
        renormalise=fields.flag(config, "norm_topk_prob", False),
        dense_layers=tuple(i for i in range(layers) if i in named or (i + 1) % step),
    )


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`; without a dense layer the width of one may be missing."""
    found = mixture(config)
    width = {} if found.dense_layers else {"intermediate_size": found.width}
    return {**sdar.defaults(config), **width, "mixture": found}


def rest(spec: ModelSpec, found: Mixture) -> dict[str, Any]:
    """As for `experts.more`."""
    return {
        "moe_intermediate_size": found.width,
        "norm_topk_prob": found.renormalise,
        "mlp_only_layers": list(found.dense_layers),
    }


FAMILY = replace(
    sdar.FAMILY,
    name="sdar_moe",
    model_types=("sdar_moe",),
    architectures=("SDARMoeForCausalLM",),
    defaults=defaults,
    written={**sdar.FAMILY.written, "model_type": "sdar_moe", "decoder_sparse_step": 1},
    names={**decoder.names(), **experts.names()},
    more=experts.more(rest),
)
