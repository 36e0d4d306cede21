"""`dkv generate` with a model that denoises canvases."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import dkv
from dkv.cli import main
from dkv.models.export import save_tokenizer

GEMMA = Path(__file__).parents[2] / "golden" / "families" / "diffusion_gemma" / "gemma_tiny"
ALPHABET, END = "0123456789+-= abcdefghij", 1
PROMPT = "12+34="


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gemma") / "model"
    shutil.copytree(GEMMA, folder, ignore=shutil.ignore_patterns("cases"))
    save_tokenizer(folder, ALPHABET, len(ALPHABET), len(ALPHABET) + 1)
    return folder


def run(capsys, folder, *options) -> dict:
    given = ("--model", folder, "--device", "cpu", "--json", "--seed", 3, "--max-new-tokens", 16, *options, PROMPT)
    assert main(["generate", *map(str, given)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {}),
        (("--steps", 3), {"max_denoising_steps": 3}),
        (("--max-denoising-steps", 3, "--entropy-bound", 2, "--t-min", 0.1, "--t-max", 0.2), None),
        (("--max-denoising-steps", 4, "--stability-threshold", 0, "--confidence-threshold", 2.5), None),
        (("--max-denoising-steps", 2, "--raw"), {"max_denoising_steps": 2, "eos_token_id": []}),
    ],
)
def test_options_are_settings(capsys, gemma, options, settings):
    found = run(capsys, gemma, *options)
    model, tokenizer = dkv.load(gemma, device="cpu"), dkv.load_tokenizer(gemma)
    if settings is None:
        pairs = zip(options[::2], options[1::2], strict=True)
        settings = {name.strip("-").replace("-", "_"): value for name, value in pairs}
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = dkv.generate(model, ids, max_new_tokens=16, seed=3, **settings)
    assert found["tokens"] == expected.sequences[0, ids.shape[1] :].tolist()
    assert found["stats"]["settings"]["entropy_bound"] == settings.get("entropy_bound", 0.1)


def test_what_means_nothing_is_refused_in_one_line(capsys, gemma):
    given = ("--model", gemma, "--device", "cpu", "--cache", "decode", PROMPT)
    assert main(["generate", *map(str, given)]) == 2
    assert "cached exactly, always" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["infill", "trace"])
def test_other_commands_say_why_not(capsys, gemma, command):
    text = "1+[MASK]=" if command == "infill" else PROMPT
    assert main([command, "--model", str(gemma), "--device", "cpu", text]) == 2
    assert "DiffusionGemma has no masks to fill" in capsys.readouterr().err


def test_its_options_are_not_of_others(capsys, folder):
    assert main(["generate", "--model", str(folder), "--device", "cpu", "--t-min", "0.1", "12+3="]) == 2
    assert "t_min" in capsys.readouterr().err


def test_lines_make_a_batch(capsys, gemma, tmp_path):
    (tmp_path / "prompts").write_text("12+34=\n1+2=\n")
    file = ("--file", tmp_path / "prompts", "--lines")
    given = ("--model", gemma, "--device", "cpu", "--json", "--seed", 3, "--steps", 3, "--max-new-tokens", 8, *file)
    assert main(["generate", *map(str, given)]) == 0
    assert torch.tensor(json.loads(capsys.readouterr().out)["tokens"]).shape == (2, 8)


def test_what_info_says(capsys):
    assert main(["info", str(GEMMA)]) == 0
    said = capsys.readouterr().out
    # Two layers of 2 heads of 16, and two of 1 head of 24; keys and values, 512 slots of 4 bytes.
    assert "diffusion_gemma" in said and "blocks of 8 slots" in said and f"{2 * 112 * 512 * 4 / 2**20:.2f} MiB" in said
