"""`dkv generate` with a model that has blocks."""

import json
import shutil
from pathlib import Path

import pytest

import dkv
from dkv.cli import main
from dkv.models.export import save_tokenizer
from dkv.tools.text import end_ids

SDAR = Path(__file__).parents[2] / "golden" / "families" / "sdar" / "sdar_tiny"
ALPHABET, PROMPT = "0123456789+-= abcdefghij", "12+34="


@pytest.fixture(scope="module")
def sdar(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdar") / "model"
    shutil.copytree(SDAR, folder, ignore=shutil.ignore_patterns("cases"))
    save_tokenizer(folder, ALPHABET, len(ALPHABET), len(ALPHABET) + 1)
    return folder


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--edit-threshold", 0.02, "--post-steps", 2), {"edit_threshold": 0.02, "post_steps": 2}),
        (("--quotas", "rounded", "--steps", 9), {"quotas": "rounded", "steps": 9}),
        (("--raw",), {"eos_token_id": []}),
    ],
)
def test_options_are_settings(capsys, sdar, options, settings):
    given = ("--model", sdar, "--device", "cpu", "--json", "--seed", 3, "--max-new-tokens", 14, *options, PROMPT)
    assert main(["generate", *map(str, given)]) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = dkv.load(sdar, device="cpu"), dkv.load_tokenizer(sdar)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    settings = {"eos_token_id": end_ids(tokenizer, model.spec), **settings}
    expected = dkv.generate(model, ids, max_new_tokens=14, seed=3, **settings)
    assert found["tokens"] == expected.sequences[0, ids.shape[1] :].tolist()
    for name, value in settings.items():
        assert found["stats"]["settings"][name] == value
