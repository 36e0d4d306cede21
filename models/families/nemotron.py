"""Nemotron-Labs-Diffusion (NVIDIA): Ministral 3, causal for what is stored, bidirectional in the block being filled."""

from collections.abc import Mapping
from typing import Any

from dkv.models.families import decoder, fields
from dkv.models.families.base import Family
from dkv.models.rotary import QueryScale, Yarn
from dkv.models.spec import ModelSpec

# What `rope_parameters` may hold; the two mscale are equal, so that they cancel out.
FIXED = {"attention_factor": 1.0, "truncate": True}
KNOWN = (
    *("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
    *("mscale_all_dim", "llama_4_scaling_beta", "max_position_embeddings", *FIXED),
)


def rotary(config: Mapping) -> dict[str, Any]:
    """The rotary attributes of a spec: YaRN, and queries that grow with their position.

    A `factor` that is null is max_position_embeddings / original_max_position_embeddings.
    """
    nested, kinds = fields.rope_parameters(config)
    if not kinds or any(kind != "yarn" for kind in kinds):
        raise ValueError(f"the configuration has rope_type={kinds}; only 'yarn' is implemented in this family")
    if odd := sorted(nested.keys() - set(KNOWN)):
        raise ValueError(
            f"the configuration has {odd[0]}={nested[odd[0]]!r} in its rope_parameters, which is not known"
        )
    fields.only(FIXED, nested)
    scales = [fields.positive(nested, name) for name in ("mscale", "mscale_all_dim")]
    fields.check(scales[0] == scales[1], "mscale", scales[0], f"only mscale_all_dim ({scales[1]}) is implemented")
    original = fields.count(nested, "original_max_position_embeddings")
    grown = fields.count(config, "max_position_embeddings") / original
    betas = (fields.positive(nested, name, usual) for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    growth = fields.optional(fields.positive)(nested, "llama_4_scaling_beta")
    return {
        "rope_theta": fields.positive({**config, **nested}, "rope_theta"),
        "rope": Yarn(fields.positive(nested, "factor", grown), original, *betas),
        "query_scale": None if growth is None else QueryScale(growth, original),
    }


def defaults(config: Mapping) -> dict[str, Any]:
    """As `Family.defaults`."""
    blocks = {"attention": "prefix_causal", "block_length": 32, "blocks_from_prompt": True, "seeded": True}
    sizes = {"max_positions": fields.count(config, "max_position_embeddings"), "norm_eps": 1e-5}
    return {**decoder.defaults(config), **sizes, **rotary(config), **blocks}


def more(spec: ModelSpec) -> dict[str, Any]:
    """As `Family.more`; a spec without YaRN, which the format cannot express, gets none."""
    if spec.rope is None:
        return {}
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": spec.rope_theta,
            "factor": spec.rope.factor,
            "original_max_position_embeddings": spec.rope.original,
            "beta_fast": spec.rope.beta_fast,
            "beta_slow": spec.rope.beta_slow,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": spec.query_scale and spec.query_scale.beta,
        }
    }


FAMILY = Family(
    name="nemotron",
    model_types=("nemotron_labs_diffusion",),
    architectures=("NemotronLabsDiffusionModel",),
    fields={**decoder.WITH_HEAD_DIM, "block_size": "block_length"},
    defaults=defaults,
    switches={"hidden_act": "silu", "sliding_window": None} | dict.fromkeys(("attention_bias", "mlp_bias"), False),
    written={"model_type": "nemotron_labs_diffusion", "attention_dropout": 0.0, "initializer_range": 0.02}
    | {"dlm_paradigm": "bidirectional"},
    copies={"bos_token_id": "eos_token_id"},
    usual_ids={131072: {"mask_token_id": 100, "eos_token_id": 11}},
    names=decoder.names("encoder", "diffusion_head"),
    more=more,
)
