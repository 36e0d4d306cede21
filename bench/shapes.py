"""Models of random weights in named shapes: what can be measured without a checkpoint."""

import copy
from dataclasses import replace

import torch

from dkv.models import ModelSpec, Transformer
from dkv.models.packing import can_pack, pack_

_LLADA = ModelSpec(
    family="llada",
    vocab_size=126464,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=12288,
    max_positions=4096,
    rope_theta=500000.0,
    norm_eps=1e-5,
    mask_token_id=126336,
)

SHAPES = {
    "d128x4": replace(
        _LLADA,
        vocab_size=1000,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        intermediate_size=384,
        mask_token_id=999,
    ),
    "d512x8": replace(
        _LLADA,
        vocab_size=32000,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=1536,
        mask_token_id=31999,
    ),
    "llada-8b": _LLADA,
    "dream-7b": ModelSpec(
        family="dream",
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        max_positions=131072,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        mask_token_id=151666,
        qkv_bias=True,
        shifted=True,
        rope_float32=False,
    ),
}


def shape(name: str, layers: int | None = None) -> ModelSpec:
    """A spec by its name, with as many layers as asked for.

    Raises:
        ValueError: no such shape, or fewer than one layer.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; known are {', '.join(SHAPES)}")
    return replace(SHAPES[name], num_layers=SHAPES[name].num_layers if layers is None else layers)


def tiny(spec: ModelSpec) -> ModelSpec:
    """The same kind of model with two layers of next to nothing."""
    heads, kv_heads = (4, 4) if spec.num_heads == spec.num_kv_heads else (4, 2)
    return replace(
        spec,
        vocab_size=256,
        hidden_size=64,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        intermediate_size=96,
        mask_token_id=255,
    )


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
    """The model as `dkv.load` would give it: a packed copy where it packs, else the model itself."""
    packs = model.device.type == "cpu" and model.dtype == torch.float32 and can_pack()
    return pack_(copy.deepcopy(model)) if packs else model
