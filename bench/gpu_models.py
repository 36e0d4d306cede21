"""Models of random weights, made on the device: the shapes of LLaDA-8B and Dream-7B, and tiny ones of both kinds."""

from dataclasses import replace

import torch

from dkv.models import ModelSpec, Transformer

SPECS = {
    "llada": ModelSpec(
        family="llada", vocab_size=126464, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128, intermediate_size=12288, max_positions=4096, rope_theta=500000.0, norm_eps=1e-5,
        mask_token_id=126336,
    ),
    "dream": ModelSpec(
        family="dream", vocab_size=152064, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4,
        head_dim=128, intermediate_size=18944, max_positions=131072, rope_theta=1000000.0, norm_eps=1e-6,
        mask_token_id=151666, qkv_bias=True, shifted=True, rope_float32=False,
    ),
}  # fmt: skip
TITLES = {"llada": "LLaDA-8B", "dream": "Dream-7B"}


def tiny(spec: ModelSpec) -> ModelSpec:
    """The same kind of model with two layers of next to nothing."""
    heads, kv_heads = (4, 4) if spec.num_heads == spec.num_kv_heads else (4, 2)
    return replace(
        spec, vocab_size=256, hidden_size=64, num_layers=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=16,
        intermediate_size=96, mask_token_id=255,
    )  # fmt: skip


def random_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A frozen model whose weights are drawn where they stay, so that no copy of them passes through the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Transformer(spec).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return model


def tiny_model(family: str, device: torch.device) -> Transformer:
    """float32, seeded, with weights that are the same on every device."""
    model = random_model(tiny(SPECS[family]), torch.device("cpu"), torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(device)
