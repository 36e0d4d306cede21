"""A small random model folder, and command lines run on it."""

from pathlib import Path

import pytest
import torch

import dkv
from dkv.cli import main
from dkv.models import ModelSpec, Transformer
from dkv.models.export import save_model, save_tokenizer
from dkv.tools.text import encode

ALPHABET, EOS, MASK = "0123456789+-= ", 14, 15


def write_random_model(folder: Path, vocab_size: int = 16) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec(
        family="llada",
        vocab_size=vocab_size,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
        max_positions=256,
        rope_theta=10000.0,
        norm_eps=1e-5,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = Transformer(spec)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    save_model(model, folder)
    save_tokenizer(folder, ALPHABET, EOS, MASK)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A random model with the tokenizer of the bundled one."""
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def no_lines_by_the_clock(monkeypatch):
    """What a slow machine says while it works is not what these tests are about."""
    monkeypatch.setattr("dkv.common.bar.PAUSE", float("inf"))


@pytest.fixture
def write_model():
    return write_random_model


@pytest.fixture
def run(capsys, folder):
    """Run a command line: run("generate", "1=") -> (exit code, stdout, stderr), with the small model."""

    def call(command: str, *args: object):
        model = ("--model", folder) if command in ("generate", "demo") and "--model" not in args else ()
        code = main([command, *map(str, (*model, *args))])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def expected(folder):
    """The text that `dkv.generate` gives: expected("1=", steps=4)."""

    def call(prompt: str, **settings):
        model, tokenizer = dkv.load(folder), dkv.load_tokenizer(str(folder))
        ids, _ = encode(tokenizer, [prompt])
        new = dkv.generate(model, ids, max_new_tokens=12, **settings).sequences[0, ids.shape[1] :].tolist()
        return tokenizer.decode(new[: new.index(EOS)] if EOS in new else new)

    return call
