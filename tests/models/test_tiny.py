"""The bundled models: their size, their files, and right answers to problems that they have not seen."""

import json
from itertools import product

import pytest
import torch

import dkv
from dkv.bench.problems import bundled as problems_of
from dkv.cli.measuring import TASKS_OF
from dkv.models.bundled import passages
from dkv.models.bundled.recipes import RECIPES
from dkv.models.bundled.tasks import TASKS, held_out
from dkv.models.bundled.text import CHARACTERS
from dkv.models.export import MASK_TOKENS
from dkv.models.folders import BUNDLED
from dkv.tools.text import answer, encode

# Share of 500 unseen problems of each kind that plain decoding has to answer exactly.
LEAST = {"tiny": 0.95, "tiny-dream": 0.95, "tiny-block": 0.75}
# The models whose training ended with 500 problems of each kind.
COUNTED = tuple(LEAST)


@pytest.fixture(scope="module", params=BUNDLED)
def bundled(request):
    model = dkv.load(request.param, device="cpu")
    return request.param, model, dkv.load_tokenizer(request.param)


def test_all_together_are_small():
    kinds = ("*.json*", "*.safetensors", "*.txt")
    shipped = [file for folder in BUNDLED.values() for kind in kinds for file in folder.glob(kind)]
    assert len(shipped) == 26 and sum(path.stat().st_size for path in shipped) <= 24e6


def test_models_are_those_of_the_script(bundled):
    name, model, tokenizer = bundled
    assert model.spec == RECIPES[name].spec
    assert len(tokenizer) == model.spec.vocab_size == RECIPES[name].mask + 1
    assert tokenizer.mask_token == MASK_TOKENS[model.spec.family]


def test_log_of_the_training(bundled):
    name = bundled[0]
    lines = list(map(json.loads, (BUNDLED[name] / "training.jsonl").read_text().splitlines()))
    settings = [line for line in lines if "name" in line]
    assert all(line["name"] == name and {"seed", "threads", "torch"} <= set(line) for line in settings)
    log, last = [line for line in lines if "loss" in line], lines[-1]
    steps = settings[-1]["steps"]
    assert [line["step"] for line in log] == sorted({*range(250, steps, 250), steps})
    assert log[-1]["seconds"] < 3 * 3600
    for task in RECIPES[name].tasks:
        assert log[-1]["loss"][task] < log[0]["loss"][task] / (5 if name in COUNTED else 1.5)
        assert name not in COUNTED or last["exact_of_500"][task] >= LEAST[name]
    if name == "tiny-text":
        assert last["unseen_loss"] < 1.8


def test_tokenizer_gives_text_back(bundled):
    name, _, tokenizer = bundled
    for family in problems_of(TASKS_OF[name], 3):
        for text in (*family.prompts, *getattr(family, "answers", ())):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_passages_are_plain_and_have_room_for_holes():
    text = (BUNDLED["tiny-text"] / passages.PASSAGES).read_text("utf-8")
    assert set(text) <= set(CHARACTERS) and "\n\n" not in text
    assert all(len(opening) == passages.OPENING for opening in passages.openings(200, seed=3))
    for whole, holes in passages.with_holes(200, seed=3):
        assert 3 <= len(holes) <= passages.HOLES and len(whole) == passages.PASSAGE
        assert all(whole[first:end].isalpha() and not whole[first - 1 : end + 1].isalpha() for first, end in holes)


# Of 4. Dream's published rule of what is settled caches some slots too early, so it has to do worse.
CACHES = {"plain": (dkv.NoCache(), 4), "decode": (dkv.DecodeCache(8), 3)}
QUICK = [("tiny", "addition", "plain"), ("tiny-dream", "addition", "decode"), ("tiny-block", "cells", "decode")]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in product(COUNTED, TASKS, CACHES)
]


@pytest.mark.parametrize(("bundled", "task", "cache"), CASES, indirect=["bundled"])
def test_unseen_problems_are_answered_exactly(bundled, task, cache):
    cache, least = CACHES[cache]
    _, model, tokenizer = bundled
    problems = held_out(4, seed=77, task=task)
    ids, mask = encode(tokenizer, [prompt for prompt, _ in problems])
    output = dkv.generate(model, ids, mask, max_new_tokens=TASKS[task].new_tokens, cache=cache)
    rows = output.sequences[:, ids.shape[1] :].tolist()
    assert not torch.isin(output.sequences, torch.tensor([model.spec.mask_token_id])).any()
    exact = sum(answer(tokenizer, model.spec, row) == right for row, (_, right) in zip(rows, problems, strict=True))
    assert exact >= least
