"""Models of every family with random weights and odd sizes, which nothing was made with: no two numbers divide."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from dkv.models.families import FAMILIES
from dkv.models.gemma import Gemma
from dkv.models.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
# A configuration of each family, and what makes it one of another.
KIN = {"a2d-llama": "A2DLlamaLMHeadModel", "stable_diffcoder": "LlamaForCausalLM"}
BASES = {
    "llada": "llada_gqa",
    "dream": "dream_gqa",
    "sdar": "families/sdar/sdar_tiny",
    "sdar_moe": "families/sdar/sdar_moe_tiny",
    "llada2": "families/llada2/llada2_tiny",
    "llada_moe": "families/llada_moe/llada_moe_tiny",
    "nemotron": "families/nemotron/nemotron_tiny",
    "fast_dllm_v2": "families/fast_dllm_v2/fast_tiny",
    "a2d-qwen2": "families/a2d/a2d_qwen2",
    "a2d-qwen3": "families/a2d/a2d_qwen3_tied",
    "a2d-llama": "families/a2d/a2d_qwen2",
    "stable_diffcoder": "families/sdar/sdar_tiny",
    "diffusion_gemma": "families/diffusion_gemma/gemma_tiny",
}
# The size of a head is a share of the hidden size.
SHARED = ("dream", "a2d-qwen2", "fast_dllm_v2", "llada_moe")


def config_of(family: str, draw: Random, processes: int) -> dict[str, Any]:
    """A random configuration whose heads divide by the number of processes, and nothing else does."""
    config = json.loads((GOLDEN / BASES[family] / "config.json").read_text())
    if family in KIN:
        kind = "llama" if family == "stable_diffcoder" else family
        config |= {"model_type": kind, "architectures": [KIN[family]], "mlp_bias": False}
    pick = draw.choice
    keys = processes * pick([1, 2]) if processes < 4 else processes
    heads, size, layers, vocabulary = keys * pick([1, 2, 3]), pick([6, 10, 14]), pick([1, 2, 3]), pick([67, 101, 203])
    ids = {"mask_token_id": vocabulary - 1, "eos_token_id": 3, "pad_token_id": 0}
    sizes = {"vocab_size": vocabulary, "intermediate_size": pick([17, 37, 51])}
    if family == "llada":
        own = {"d_model": heads * size, "n_heads": heads, "n_kv_heads": keys, "n_layers": layers}
        own |= {"embedding_size": vocabulary, "mlp_hidden_size": sizes["intermediate_size"]}
        return config | sizes | ids | own | _coins(draw, "weight_tying", "include_bias", "include_qkv_bias")
    sizes |= {"hidden_size": heads * size if family in SHARED else pick([26, 35, 53])}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": keys, "num_hidden_layers": layers}
    if family == "diffusion_gemma":
        return config | {"canvas_length": 5, "text_config": config["text_config"] | sizes | _gemma(draw, processes)}
    more = {} if family in SHARED else {"head_dim": size}
    for name in ("block_size", "bd_size"):
        more |= {name: pick([3, 4, 6])} if name in config else {}
    if "attention_bias" in config and family != "nemotron":
        more |= _coins(draw, "attention_bias")
    return config | sizes | ids | more | _coins(draw, "tie_word_embeddings") | _mixture(family, draw, layers, size)


def _coins(draw: Random, *names: str) -> dict[str, bool]:
    return {name: draw.random() < 0.5 for name in names}


def _gemma(draw: Random, processes: int) -> dict[str, Any]:
    kinds = [*draw.choices(["sliding_attention", "full_attention"], k=2), "full_attention"]
    own = {str(i): {"head_dim": 12, "num_key_value_heads": processes} for i, kind in enumerate(kinds) if "full" in kind}
    experts = {"num_experts": 5, "moe_intermediate_size": draw.choice([7, 9, 12])}
    return {"num_hidden_layers": 3, "layer_types": kinds, "per_layer_config": own, "head_dim": 8, **experts}


def _mixture(family: str, draw: Random, layers: int, size: int) -> dict[str, Any]:
    """Experts, and which layers have them."""
    pick, sparse = draw.choice, [draw.randrange(2) for _ in range(layers)]
    dense = [i for i, one in enumerate(sparse) if not one]
    grouped = {"num_shared_experts": pick([0, 1, 2]), "n_group": 2, "topk_group": 1, "moe_intermediate_size": 9}
    turned = {"rotary_dim": 4, "partial_rotary_factor": 4 / size, "first_k_dense_replace": len(dense)}
    beside = {"shared_expert_intermediate_size": pick([None, 5]), "clip_qkv": pick([None, 1.5])}
    widths = {"expert_intermediate_size": 11, "dense_intermediate_size": 37, "moe_layer_freq": sparse}
    found = {
        "sdar_moe": {"moe_intermediate_size": pick([7, 15]), "mlp_only_layers": dense},
        "llada2": grouped | turned | _coins(draw, "use_qkv_bias", "use_bias", "use_qk_norm"),
        "llada_moe": beside | widths | _coins(draw, "moe_router_enable_expert_bias", "qk_layernorm"),
    }
    if family not in found:
        return {}
    return found[family] | {"num_experts": pick([6, 10]), "num_experts_per_tok": pick([1, 2, 3])}


def made(folder: Path, seed: int, processes: int) -> list[Path]:
    """Write a checkpoint of each family, half of them in several files; their folders."""
    for family in BASES:
        draw = Random(f"{family} {seed} {processes}")
        config, kind = config_of(family, draw, processes), FAMILIES[family]
        model = (Gemma if family == "diffusion_gemma" else Transformer)(kind.spec(config))
        noise, tensors = torch.Generator().manual_seed(seed), {}
        pieces = kind.pieces({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
        for name, parts in pieces.items():
            x = torch.randn(sum(part.shape[0] for part in parts), *parts[0].shape[1:], generator=noise)
            norm = x.dim() == 1 and "bias" not in name
            # Larger ones make attention so sharp that states do not change, and policies that go by change have ties.
            tensors[name] = 1 + 0.1 * x if norm else x * (0.3 if x.dim() == 1 else 1.5 * x.shape[-1] ** -0.5)
        place = folder / family
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        _save(tensors, place, draw.choice([1, 3]))
    return [folder / family for family in BASES]


def _save(tensors: dict[str, torch.Tensor], folder: Path, count: int) -> None:
    if count == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: x for name, x in tensors.items() if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
