"""A small model of each family, and a stand-in that answers what it is told to."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dkv.models import ModelSpec, Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
MASK, EOS = 63, 62


def small_spec(**changes) -> ModelSpec:
    sizes = {
        "family": "llada", "vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
        "head_dim": 16, "intermediate_size": 96, "max_positions": 256, "rope_theta": 10000.0, "norm_eps": 1e-5,
        "mask_token_id": MASK, "eos_token_id": EOS,
    }  # fmt: skip
    return ModelSpec(**{**sizes, **changes})


def small_model(**changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(small_spec(**changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.22)
    return model


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """Small models are slower with more."""


@pytest.fixture(scope="session")
def llada() -> Transformer:
    return small_model()


@pytest.fixture(scope="session")
def dream() -> Transformer:
    return small_model(family="dream", num_kv_heads=2, shifted=True, qkv_bias=True, rope_float32=False)


@pytest.fixture(params=["llada", "dream"])
def model(request) -> Transformer:
    return request.getfixturevalue(request.param)


class Copy(nn.Module):
    """A head that gives the logits it gets."""

    def forward(self, x):
        return x.clone()


class Stub:
    """A model without weights: `script(call, positions)` gives the logits [1, T, V] of each pass, all rows in one.

    Hidden states are the logits themselves and the head hands them on. `calls` records the number
    of slots of every pass.
    """

    def __init__(self, script, vocab_size: int = 64, shifted: bool = False):
        self.script, self.calls = script, []
        self.spec = small_spec(vocab_size=vocab_size, mask_token_id=vocab_size - 1, eos_token_id=None, shifted=shifted)
        self.device, self.dtype, self.head = torch.device("cpu"), torch.float32, Copy()

    def step(self, tokens, positions, buffer, *, outputs=None, **_):
        logits = self.script(len(self.calls), positions[None])[0]
        self.calls.append(len(positions))
        return logits if outputs is None else logits.index_select(0, outputs)


@pytest.fixture
def stub():
    return Stub


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def build():
    return small_model


@pytest.fixture(scope="session")
def padded():
    return pad_rows


def pad_rows(rows: list[list[int]], side: str = "left", pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of rows of different lengths."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill, real = [pad] * (width - len(row)), [1] * len(row)
        ids.append(fill + row if side == "left" else row + fill)
        mask.append([0] * len(fill) + real if side == "left" else real + [0] * len(fill))
    return torch.tensor(ids).view(len(rows), width), torch.tensor(mask).view(len(rows), width)
