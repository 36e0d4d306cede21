"""Further ways to compute an operation, which need more than a line."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv import kernels
from dkv.bench.gpu.cases import Inputs
from dkv.kernels.common.backend import has_triton


def seen(inputs: Inputs) -> Tensor:
    """bool [B, 1, S]: what ranges and gaps let through; without them all, which a mask of padding would say too."""
    k, visible = inputs["k"], torch.ones(inputs["k"].shape[:2], dtype=torch.bool, device=inputs["k"].device)
    slot = torch.arange(k.shape[1], device=k.device)
    for name, hides in (("key_ranges", False), ("key_gaps", True)):
        if (bounds := inputs.get(name)) is not None:
            visible &= ((slot >= bounds[:, :1]) & (slot < bounds[:, 1:])) != hides
    return visible.unsqueeze(1)


def sdpa(inputs: Inputs) -> Tensor:
    """PyTorch's own attention."""
    query, key, value = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    group = query.shape[1] // key.shape[1]
    if not {"key_ranges", "key_gaps"} & inputs.keys():
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=group > 1).transpose(1, 2)
    # With a mask, grouped heads would take the slow path; transformers repeats them too.
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    mask = seen(inputs).unsqueeze(1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def compiled_flex(inputs: Inputs) -> Callable[[], Tensor]:
    """Flex attention, compiled for these inputs at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled, mask = torch.compile(flex_attention, dynamic=False), None
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    if {"key_ranges", "key_gaps"} & inputs.keys():
        visible = seen(inputs).squeeze(1)

        def inside(b, h, i, j):
            return visible[b, j]

        mask = create_block_mask(inside, len(q), None, q.shape[2], k.shape[2], device=str(q.device))
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def both_sides(device: torch.device, choice: kernels.Choice, work: kernels.Workspace) -> dict[str, Any]:
    """The Triton backend multiplies with the head in its kernel, or by PyTorch in strips: the rows decide which."""
    if device.type != "cuda" or not has_triton():
        return {}
    from dkv.kernels.choose import triton

    def way(side: Callable[..., Any]) -> Callable[[Inputs], Any]:
        return lambda x: side(x["hidden"], x["head_weight"], choice, x.get("head_bias"), None, work)

    return {"fused": way(triton.by_kernel)} | ({"strips": way(triton.by_strips)} if triton.has_strips(device) else {})
