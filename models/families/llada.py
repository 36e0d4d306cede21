"""LLaDA: GSAI-ML/LLaDA-8B-*, LLaDA-1.5, and the language model of MMaDA."""

from collections.abc import Mapping

from dkv.models.families import fields
from dkv.models.families.base import Family
from dkv.models.spec import ModelSpec

# Switches with one implemented setting each; an absent one counts as set so.
SWITCHES = {
    "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "rope": True, "alibi": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
}  # fmt: skip

# Size of a published vocabulary -> ids that some of its files leave out. Elsewhere these would be any tokens.
IDS = {size: {"mask": 126336, "end": 126081, "turn_end": 126348} for size in (126464, 134656)}

# Checkpoint module -> module of `Transformer`; {} is the number of the layer.
NAMES = {
    "model.transformer.wte": "embed",
    "model.transformer.ln_f": "norm",
    "model.transformer.ff_out": "head",
    "model.transformer.blocks.{}.attn_norm": "layers.{}.attn_norm",
    "model.transformer.blocks.{}.q_proj": "layers.{}.q_proj",
    "model.transformer.blocks.{}.k_proj": "layers.{}.k_proj",
    "model.transformer.blocks.{}.v_proj": "layers.{}.v_proj",
    "model.transformer.blocks.{}.attn_out": "layers.{}.o_proj",
    "model.transformer.blocks.{}.ff_norm": "layers.{}.mlp_norm",
    "model.transformer.blocks.{}.ff_proj": "layers.{}.gate_proj",
    "model.transformer.blocks.{}.up_proj": "layers.{}.up_proj",
    "model.transformer.blocks.{}.ff_out": "layers.{}.down_proj",
}


def spec(config: Mapping) -> ModelSpec:
    """The spec of a LLaDA configuration (GSAI-ML/LLaDA-8B-*, LLaDA-1.5, the MMaDA language model).

    Defaults of absent fields are those of the published configuration class, but for the token
    ids (those of `IDS`) and the table size (`vocab_size`), which there are GPT-2's.

    Raises:
        ValueError: a field is missing, malformed, or asks for something not implemented.
    """
    bias = fields.flag(config, "include_bias", False)
    # Left out, the bias of the norms follows that of the projections.
    fields.only(SWITCHES, {**config, "bias_for_layer_norm": fields.flag(config, "bias_for_layer_norm", bias)})
    hidden, heads = fields.count(config, "d_model"), fields.count(config, "n_heads")
    rows = fields.count(config, "embedding_size", fields.count(config, "vocab_size"))
    usual = IDS.get(fields.count(config, "vocab_size"), {})
    eos = fields.token_id(config, "eos_token_id", usual.get("end"), rows)
    return ModelSpec(
        family="llada",
        vocab_size=rows,
        hidden_size=hidden,
        num_layers=fields.count(config, "n_layers"),
        num_heads=heads,
        num_kv_heads=_kv_heads(config, heads),
        head_dim=fields.share(config, "d_model", "n_heads"),
        intermediate_size=fields.count(config, "mlp_hidden_size", hidden * fields.count(config, "mlp_ratio", 4)),
        max_positions=fields.count(config, "max_sequence_length", 1024),
        rope_theta=fields.rope_theta(config, 10000.0),
        norm_eps=fields.positive(config, "rms_norm_eps", 1e-5),
        mask_token_id=fields.mask_id(config, usual.get("mask"), rows),
        eos_token_id=eos,
        eot_token_id=fields.token_id(config, "eot_token_id", usual.get("turn_end"), rows),
        pad_token_id=fields.token_id(config, "pad_token_id", eos, rows),
        qkv_bias=fields.flag(config, "include_qkv_bias", False),
        linear_bias=bias,
        tied_head=fields.flag(config, "weight_tying", True),
        rope_float32=fields.flag(config, "rope_full_precision", True),
    )


def _kv_heads(config: Mapping, heads: int) -> int:
    """Key heads: `n_kv_heads`, or what the older switch `multi_query_attention` says."""
    found = fields.count(config, "n_kv_heads", heads)
    if fields.value(config, "multi_query_attention") is None:
        return found
    single = fields.flag(config, "multi_query_attention", False)
    wanted = 1 if single else heads
    if fields.value(config, "n_kv_heads") is not None and found != wanted:
        raise ValueError(
            f"the configuration has n_kv_heads={found!r}, but multi_query_attention={single!r} means {wanted}: "
            "set one of them to null"
        )
    return wanted


def config(spec: ModelSpec) -> dict:
    """A LLaDA configuration of these sizes, without its dtype."""
    return {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", **SWITCHES,
        "d_model": spec.hidden_size, "n_layers": spec.num_layers, "n_heads": spec.num_heads,
        "n_kv_heads": spec.num_kv_heads, "multi_query_attention": None, "mlp_hidden_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size, "embedding_size": spec.vocab_size, "weight_tying": spec.tied_head,
        "max_sequence_length": spec.max_positions, "rope_theta": spec.rope_theta,
        "rope_full_precision": spec.rope_float32, "rms_norm_eps": spec.norm_eps,
        "include_bias": spec.linear_bias, "include_qkv_bias": spec.qkv_bias,
        "attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0, "flash_attention": False,
        "mask_token_id": spec.mask_token_id, "eos_token_id": spec.eos_token_id, "pad_token_id": spec.pad_token_id,
    }  # fmt: skip


FAMILY = Family(
    name="llada",
    model_types=("llada", "mmada"),
    architectures=("LLaDAModelLM", "MMadaModelLM"),
    spec=spec,
    config=config,
    names=NAMES,
    rows_field="embedding_size",
    tied_field="weight_tying",
)
