"""The bundled model: its size, its files, and right answers to problems that it has not seen."""

import json

import pytest
import torch

import dkv
from dkv.models.loader import BUNDLED
from dkv.models.tasks import held_out
from dkv.text import answer, encode, load_tokenizer

FOLDER = BUNDLED["tiny"]


@pytest.fixture(scope="module")
def tiny():
    return dkv.load("tiny", device="cpu"), load_tokenizer("tiny", "llada")


def test_size_and_log():
    shipped = [*FOLDER.glob("*.json"), *FOLDER.glob("*.safetensors")]
    assert sum(path.stat().st_size for path in shipped) <= 8e6
    log = [json.loads(line) for line in (FOLDER / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == sorted(line["step"] for line in log)
    assert log[-1]["loss"] < log[0]["loss"] / 5


def test_tokenizer_gives_text_back(tiny):
    _, tokenizer = tiny
    for prompt, right in held_out(3):
        assert tokenizer.decode(tokenizer(prompt + right)["input_ids"]) == prompt + right


@pytest.mark.parametrize(("cache", "least"), [(dkv.NoCache(), 18), (dkv.Decode(8), 15)], ids=["plain", "decode"])
def test_unseen_problems_are_answered_exactly(tiny, cache, least):
    model, tokenizer = tiny
    problems = held_out(20, seed=77)
    ids, mask = encode(tokenizer, [prompt for prompt, _ in problems])
    output = dkv.generate(model, ids, mask, max_new_tokens=64, cache=cache)
    rows = output.sequences[:, ids.shape[1] :].tolist()
    assert not torch.isin(output.sequences, torch.tensor([model.spec.mask_token_id])).any()
    exact = sum(answer(tokenizer, model.spec, row) == right for row, (_, right) in zip(rows, problems, strict=True))
    assert exact >= least
