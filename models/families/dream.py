"""Dream: Dream-v0-*-7B, Dream-Coder, DiffuCoder. Qwen2 with shifted outputs."""

from collections.abc import Mapping

from dkv.models.families import fields
from dkv.models.families.base import Family
from dkv.models.spec import ModelSpec

SWITCHES = {"hidden_act": "silu", "use_sliding_window": False}

# Size of a published vocabulary -> ids that some of its files leave out. Elsewhere these would be any tokens.
IDS = {152064: {"mask": 151666, "end": 151643, "turn_end": 151645}}

# Checkpoint module -> module of `Transformer`; {} is the number of the layer.
NAMES = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers.{}.input_layernorm": "layers.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "layers.{}.q_proj",
    "model.layers.{}.self_attn.k_proj": "layers.{}.k_proj",
    "model.layers.{}.self_attn.v_proj": "layers.{}.v_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.o_proj",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.mlp.gate_proj": "layers.{}.gate_proj",
    "model.layers.{}.mlp.up_proj": "layers.{}.up_proj",
    "model.layers.{}.mlp.down_proj": "layers.{}.down_proj",
}


def spec(config: Mapping) -> ModelSpec:
    """The spec of a Dream configuration (Dream-v0-*-7B, Dream-Coder, DiffuCoder): Qwen2 with q/k/v bias.

    Defaults of absent fields are those of the published configuration class.

    Raises:
        ValueError: a field is missing, malformed, or asks for something not implemented.
    """
    fields.only(SWITCHES, config)
    heads, rows = fields.count(config, "num_attention_heads"), fields.count(config, "vocab_size")
    if fields.value(config, "head_dim") is None:
        head_dim = fields.share(config, "hidden_size", "num_attention_heads")
    else:
        head_dim = fields.count(config, "head_dim")
    usual = IDS.get(rows, {})
    eos = fields.token_id(config, "eos_token_id", usual.get("end"), rows)
    return ModelSpec(
        family="dream",
        vocab_size=rows,
        hidden_size=fields.count(config, "hidden_size"),
        num_layers=fields.count(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.count(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=fields.count(config, "intermediate_size"),
        max_positions=fields.count(config, "max_position_embeddings", 32768),
        rope_theta=fields.rope_theta(config, 10000.0),
        norm_eps=fields.positive(config, "rms_norm_eps", 1e-6),
        mask_token_id=fields.mask_id(config, usual.get("mask"), rows),
        eos_token_id=eos,
        eot_token_id=fields.token_id(config, "eot_token_id", usual.get("turn_end"), rows),
        pad_token_id=fields.token_id(config, "pad_token_id", eos, rows),
        qkv_bias=True,
        tied_head=fields.flag(config, "tie_word_embeddings", False),
        shifted=True,
        rope_float32=False,
    )


def config(spec: ModelSpec) -> dict:
    """A Dream configuration of these sizes, without its dtype."""
    return {
        "architectures": ["DreamModel"], "model_type": "Dream", **SWITCHES,
        "hidden_size": spec.hidden_size, "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.intermediate_size, "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_head, "max_position_embeddings": spec.max_positions,
        "rope_theta": spec.rope_theta, "rms_norm_eps": spec.norm_eps,
        "attention_dropout": 0.0, "initializer_range": 0.02, "sliding_window": None,
        "max_window_layers": 28,
        "mask_token_id": spec.mask_token_id, "bos_token_id": spec.eos_token_id, "eos_token_id": spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
    }  # fmt: skip


FAMILY = Family(
    name="dream",
    model_types=("dream",),
    architectures=("DreamModel",),
    spec=spec,
    config=config,
    names=NAMES,
    rows_field="vocab_size",
    tied_field="tie_word_embeddings",
)
