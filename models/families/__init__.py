"""Checkpoint families: how a `config.json` becomes a `ModelSpec`, and how its tensors are named.

An adapter holds no arithmetic. What a family can express and `models/transformer.py` cannot is
refused by name, so a checkpoint never loads into a network that computes something else.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of

from torch import Tensor

from dkv.models.families import fields
from dkv.models.families.others import EXPERTS, other_family
from dkv.models.packing import PackedLinear
from dkv.models.spec import ModelSpec
from dkv.models.transformer import Transformer

# Switches with one implemented setting each; an absent one counts as set so.
LLADA_SWITCHES = {
    "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "rope": True, "alibi": False,
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
}  # fmt: skip
DREAM_SWITCHES = {"hidden_act": "silu", "use_sliding_window": False}

# Size of a published vocabulary (LLaDA's and MMaDA's; Dream's) -> ids that some of its files leave out. Of another
# vocabulary these would be any tokens.
LLADA_IDS = {size: {"mask": 126336, "end": 126081, "turn_end": 126348} for size in (126464, 134656)}
DREAM_IDS = {152064: {"mask": 151666, "end": 151643, "turn_end": 151645}}

# Checkpoint module -> module of `Transformer`; {} is the number of the layer.
LLADA_NAMES = {
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
DREAM_NAMES = {
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


def llada_spec(config: Mapping) -> ModelSpec:
    """The spec of a LLaDA configuration (GSAI-ML/LLaDA-8B-*, LLaDA-1.5, the MMaDA language model).

    Defaults of absent fields are those of the published configuration class, but for the token
    ids (those of `LLADA_IDS`) and the table size (`vocab_size`), which there are GPT-2's.

    Raises:
        ValueError: a field is missing, malformed, or asks for something not implemented.
    """
    bias = fields.flag(config, "include_bias", False)
    # Left out, the bias of the norms follows that of the projections.
    fields.only(LLADA_SWITCHES, {**config, "bias_for_layer_norm": fields.flag(config, "bias_for_layer_norm", bias)})
    hidden, heads = fields.count(config, "d_model"), fields.count(config, "n_heads")
    rows = fields.count(config, "embedding_size", fields.count(config, "vocab_size"))
    usual = LLADA_IDS.get(fields.count(config, "vocab_size"), {})
    eos = fields.token_id(config, "eos_token_id", usual.get("end"), rows)
    return ModelSpec(
        family="llada",
        vocab_size=rows,
        hidden_size=hidden,
        num_layers=fields.count(config, "n_layers"),
        num_heads=heads,
        num_kv_heads=_llada_kv_heads(config, heads),
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


def dream_spec(config: Mapping) -> ModelSpec:
    """The spec of a Dream configuration (Dream-v0-*-7B, Dream-Coder, DiffuCoder): Qwen2 with q/k/v bias.

    Defaults of absent fields are those of the published configuration class.

    Raises:
        ValueError: a field is missing, malformed, or asks for something not implemented.
    """
    fields.only(DREAM_SWITCHES, config)
    heads, rows = fields.count(config, "num_attention_heads"), fields.count(config, "vocab_size")
    if fields.value(config, "head_dim") is None:
        head_dim = fields.share(config, "hidden_size", "num_attention_heads")
    else:
        head_dim = fields.count(config, "head_dim")
    usual = DREAM_IDS.get(rows, {})
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


def llada_config(spec: ModelSpec) -> dict:
    """A LLaDA configuration of these sizes, without its dtype."""
    return {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", **LLADA_SWITCHES,
        "d_model": spec.hidden_size, "n_layers": spec.num_layers, "n_heads": spec.num_heads,
        "n_kv_heads": spec.num_kv_heads, "multi_query_attention": None, "mlp_hidden_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size, "embedding_size": spec.vocab_size, "weight_tying": spec.tied_head,
        "max_sequence_length": spec.max_positions, "rope_theta": spec.rope_theta,
        "rope_full_precision": spec.rope_float32, "rms_norm_eps": spec.norm_eps,
        "include_bias": spec.linear_bias, "include_qkv_bias": spec.qkv_bias,
        "attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0, "flash_attention": False,
        "mask_token_id": spec.mask_token_id, "eos_token_id": spec.eos_token_id, "pad_token_id": spec.pad_token_id,
    }  # fmt: skip


def dream_config(spec: ModelSpec) -> dict:
    """A Dream configuration of these sizes, without its dtype."""
    return {
        "architectures": ["DreamModel"], "model_type": "Dream", **DREAM_SWITCHES,
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


@dataclass(frozen=True)
class Family:
    """An adapter: how to recognise a configuration, read it, write it, and name its tensors."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    spec: Callable[[Mapping], ModelSpec]
    config: Callable[[ModelSpec], dict]
    names: Mapping[str, str]
    # The configuration fields that say how many rows the two tables have, and whether they are one.
    rows_field: str
    tied_field: str

    def checkpoint_names(self, parameters: Iterable[str]) -> dict[str, str]:
        """Checkpoint name of every parameter name of `Transformer`, in the same order.

        Raises:
            ValueError: the family has no such parameter.
        """
        patterns = {ours: theirs for theirs, ours in self.names.items()}
        found = {}
        for name in parameters:
            module, _, leaf = name.rpartition(".")
            pattern = patterns.get(re.sub(r"\.\d+\.", ".{}.", module))
            if pattern is None:
                raise ValueError(f"the {self.name} format has no place for {name}")
            layer = re.search(r"\d+", module)
            found[name] = f"{pattern.format(layer and layer[0])}.{leaf}"
        return found

    def weight_name(self, module: str) -> str:
        """Checkpoint name of the weight of a module of `Transformer`."""
        return next(iter(self.checkpoint_names([f"{module}.weight"]).values()))


FAMILIES = {
    "llada": Family(
        "llada", ("llada", "mmada"), ("LLaDAModelLM", "MMadaModelLM"), llada_spec, llada_config,
        LLADA_NAMES, rows_field="embedding_size", tied_field="weight_tying",
    ),
    "dream": Family(
        "dream", ("dream",), ("DreamModel",), dream_spec, dream_config, DREAM_NAMES,
        rows_field="vocab_size", tied_field="tie_word_embeddings",
    ),
}  # fmt: skip


def family_of(config: Mapping) -> Family:
    """The family that a configuration names by its `architectures`, or else by its `model_type`.

    Raises:
        ValueError: neither is known, or they tell of a family that is not loaded; the message names it.
    """
    kind, classes = config.get("model_type"), fields.names(config, "architectures")
    stated = f"model_type is {kind!r}, architectures {classes}"
    known = "; ".join(
        f"{f.name} (model_type {', '.join(f.model_types)}; {', '.join(f.architectures)})" for f in FAMILIES.values()
    )
    kind = kind.lower() if isinstance(kind, str) else ""
    by_class = [family for family in FAMILIES.values() if set(classes) & set(family.architectures)]
    other = None if by_class else other_family([*classes, kind])
    if other is not None:
        raise ValueError(f"this model is of the family {other}, which dkv does not load ({stated}); known are {known}")
    found = by_class or [family for family in FAMILIES.values() if kind in family.model_types]
    if not found:
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
        hint = " (by its class it writes from left to right)" if causal else ""
        raise ValueError(f"unknown model family: {stated}{hint}; known are {known}")
    if experts := next((field for field in EXPERTS if fields.value(config, field) is not None), None):
        raise ValueError(
            f"this is a mixture of experts ({experts}={config[experts]!r}), such as LLaDA-MoE, which dkv does not load "
            f"({stated}); known are {known}"
        )
    return found[0]


def to_checkpoint(model: Transformer) -> tuple[dict, dict[str, Tensor]]:
    """The model as a checkpoint of its family: the content of `config.json`, and the tensors by their names there.

    The tensors share the storage of the model's. The configuration has every field that the
    published modeling code reads, so that `family_of(config).spec(config) == model.spec`.

    Raises:
        ValueError: the format cannot express the model, or its weights are packed.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("packed weights cannot be saved: call dkv.unpack(model), or load the model with pack=False")
    spec, family = model.spec, FAMILIES[model.spec.family]
    names = family.checkpoint_names(n for n, _ in model.named_parameters())
    config = {**family.config(spec), "torch_dtype": str(model.dtype).removeprefix("torch."), "use_cache": False}
    if spec.eot_token_id is not None:
        config["eot_token_id"] = spec.eot_token_id
    # The limit comes from a tokenizer, not from the configuration.
    again = replace(family.spec(config), vocab_limit=spec.vocab_limit)
    for field in (one.name for one in fields_of(spec) if one.compare):
        if getattr(spec, field) != getattr(again, field):
            raise ValueError(
                f"the {family.name} format cannot express {field}={getattr(spec, field)!r}, only "
                f"{getattr(again, field)!r}"
            )
    return config, {names[n]: p.detach() for n, p in model.named_parameters()}


def _llada_kv_heads(config: Mapping, heads: int) -> int:
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
