"""Models of random weights in named shapes: what can be measured without a checkpoint."""

import copy
from dataclasses import replace

import torch

from dkv.models import ModelSpec, Transformer
from dkv.models.joining import join_
from dkv.models.mixture import Mixture
from dkv.models.packing import can_pack, pack_
from dkv.models.rotary import QueryScale, Yarn

LLADA = {"family": "llada", "max_positions": 4096, "rope_theta": 500000.0, "norm_eps": 1e-5}
DREAM = {"family": "dream", "max_positions": 131072, "rope_theta": 1000000.0, "norm_eps": 1e-6}
DREAM |= {"qkv_bias": True, "shifted": True, "rope_float32": False}

SIZES = ("vocab_size", "mask_token_id", "num_layers", "hidden_size", "intermediate_size")
SIZES += ("num_heads", "num_kv_heads", "head_dim")
_TABLE = {
    "d128x4": (LLADA, 1000, 999, 4, 128, 384, 4, 4, 32),
    "d512x8": (LLADA, 32000, 31999, 8, 512, 1536, 8, 8, 64),
    "llada-8b": (LLADA, 126464, 126336, 32, 4096, 12288, 32, 32, 128),
    "dream-7b": (DREAM, 152064, 151666, 28, 3584, 18944, 28, 4, 128),
}
SHAPES = {name: ModelSpec(**kind, **dict(zip(SIZES, sizes, strict=True))) for name, (kind, *sizes) in _TABLE.items()}

# What the models of a family have beside sizes.
_QWEN = {"norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN3 = {**_QWEN, "qk_norm": True}
_BY_32 = {"attention": "block", "block_length": 32}
_ROUTER = {"score": "sigmoid", "groups": 8, "top_groups": 4, "renormalise": True, "scaling": 2.5, "bias": "choice"}
_SDAR = {**_QWEN3, "family": "sdar", "attention": "block", "block_length": 4}
_YARN = {"rope": Yarn(16.0, 16384), "query_scale": QueryScale(0.1, 16384)}
FAMILIES = {
    "llada2": {**_QWEN3, **_BY_32, "family": "llada2", "mixture": _ROUTER},
    "llada2, dense": {**_QWEN3, **_BY_32, "family": "llada2"},
    "sdar": _SDAR,
    "sdar_moe": {**_SDAR, "family": "sdar_moe", "mixture": {"renormalise": True}},
    "a2d, mdlm": {**_QWEN3, "family": "a2d-qwen3"},
    "a2d, bd3lm": {**_QWEN3, "family": "a2d-qwen3", "attention": "block", "blocks_from_prompt": True},
    "fast_dllm_v2": {**_QWEN, **_BY_32, "family": "fast_dllm_v2", "qkv_bias": True, "shifted": True, "seeded": True},
    "llada_moe": {**_QWEN3, "family": "llada_moe", "norm_eps": 1e-5, "mixture": {}},
    "nemotron": {**_QWEN, **_BY_32, **_YARN, "family": "nemotron", "norm_eps": 1e-5, "attention": "prefix_causal"}
    | {"blocks_from_prompt": True, "seeded": True},
}
# Of a mixture; the chosen ones have together as many features as the MLP of a dense model.
EXPERTS, CHOSEN = 64, 8


def shape(name: str, layers: int | None = None) -> ModelSpec:
    """A spec by its name, with as many layers as asked for.

    Raises:
        ValueError: no such shape, or fewer than one layer.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; known are {', '.join(SHAPES)}")
    return replace(SHAPES[name], num_layers=SHAPES[name].num_layers if layers is None else layers)


def of_family(name: str, sizes: ModelSpec) -> ModelSpec:
    """The spec of a family by its name, in the sizes of another model, and one head of keys for four of its queries."""
    changes = dict(FAMILIES[name])
    if "mixture" in changes:
        width = max(sizes.intermediate_size // CHOSEN, 1)
        changes["mixture"] = Mixture(EXPERTS, CHOSEN, width, **changes["mixture"])
    kept = {field: getattr(sizes, field) for field in (*SIZES, "max_positions")}
    return ModelSpec(**kept | {"num_kv_heads": max(sizes.num_heads // 4, 1)} | changes)


def tiny(spec: ModelSpec) -> ModelSpec:
    """The same kind of model with two layers of next to nothing."""
    kv_heads = 4 if spec.num_heads == spec.num_kv_heads else 2
    return replace(spec, **dict(zip(SIZES, (256, 255, 2, 64, 96, 4, kv_heads, 16), strict=True)))


def random_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype, std: float = 0.06) -> Transformer:
    """A frozen model of seeded noise, drawn where it stays, so that no copy passes through the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            model = Transformer(spec).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=std)
    return model


def as_loaded(model: Transformer) -> Transformer:
    """A copy of the model as `dkv.load` would give it: packed where it packs, else with joined products."""
    packs = model.device.type == "cpu" and can_pack(model.dtype)
    return (pack_ if packs else join_)(copy.deepcopy(model))
