"""Small models of transformers, the same for each implementation of attention, and how close two may be."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

import dkv
from dkv.kernels import use_backend

V5 = int(transformers.__version__.split(".")[0]) >= 5
LENGTHS = (21, 24, 9)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": ("BertConfig", {**SIZES, **NO_DROPOUT, "max_position_embeddings": 32}),
    "modernbert": ("ModernBertConfig", {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2}),
    "encoder llama": ("LlamaConfig", GQA),
    "llama": ("LlamaConfig", GQA),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 6}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    dkv.register()


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        from dkv.kernels.common.launch import INTERPRETED

        if not INTERPRETED:
            pytest.skip("needs TRITON_INTERPRET=1")
    with use_backend(request.param):
        yield request.param


def skip_outside(name: str) -> None:
    if name in ("bert", "modernbert") and not V5:
        pytest.skip(f"{name} goes through AttentionInterface since transformers 5")


def make(name: str, implementation: str, auto=AutoModel, **changes) -> nn.Module:
    """A small model with weights that make attention sharp, the same for each implementation."""
    skip_outside(name)
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(**{**sizes, **changes})
    if name == "encoder llama":
        config.is_causal = False
    model = auto.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=1.0 if 50 in weight.shape else 0.3, generator=generator)
    if name == "encoder llama" and not V5:
        set_encoder(model)  # and, with padding, a mask of pairs
    return model


def set_encoder(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def batch(side: str | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Ids, attention mask (None without padding) and which positions are real."""
    width = max(LENGTHS)
    ids = torch.randint(3, 50, (len(LENGTHS), width), generator=torch.Generator().manual_seed(1))
    place = torch.arange(width)
    lengths = torch.tensor(LENGTHS if side else [width] * len(LENGTHS))[:, None]
    real = place >= width - lengths if side == "left" else place < lengths
    return ids.masked_fill(~real, 0), real.long() if side else None, real


def positions(real: torch.Tensor) -> torch.Tensor:
    return (real.cumsum(-1) - 1).clamp(min=0)


def pairs(name: str, real: torch.Tensor, window: int = 6) -> torch.Tensor:
    """Which keys a query sees, [B, 1, N, S], written out here."""
    i, j = torch.arange(real.shape[1])[:, None], torch.arange(real.shape[1])
    rule = {"mistral": (j <= i) & (j > i - window), "encoder llama": torch.ones_like(i == j)}.get(name, j <= i)
    return rule & real[:, None, None]


def run(model, ids, mask, real, name) -> torch.Tensor:
    extra = {} if name in ("bert", "modernbert") else {"position_ids": positions(real)}
    if name == "encoder llama" and not V5 and mask is not None:
        mask = pairs(name, real)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **extra)[0][real]


def exact(name: str, side: str | None) -> torch.Tensor:
    """float64 with sdpa; decoders get the mask of pairs that is written out here."""
    ids, mask, real = batch(side)
    if name not in ("bert", "modernbert"):
        mask = pairs(name, real)
    return run(make(name, "sdpa").double(), ids, mask, real, name)


def assert_as_good(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """`actual` is off by no more than twice what sdpa is off at the same dtype, and a few roundings."""
    assert actual.dtype == plain.dtype
    assert truth.dtype == torch.float64
    eps = torch.finfo(actual.dtype).eps
    bound = 2 * (plain - truth).abs().amax() + 4 * eps * truth.abs().amax()
    off = (actual - truth).abs().amax()
    assert off <= bound, f"off by {off:.3g}, allowed {bound:.3g}"
    assert bound < 0.2 * truth.abs().amax()  # else the test says nothing


@pytest.fixture
def small() -> SimpleNamespace:
    """The functions above."""
    functions = (make, set_encoder, batch, positions, pairs, run, exact, assert_as_good)
    return SimpleNamespace(**{function.__name__: function for function in functions})
