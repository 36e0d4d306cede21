"""The block policies against eager PyTorch: the same tokens, and figures that follow from them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dkv
from dkv.bench.baselines import fast_dllm
from dkv.bench.lineup import BLOCKED, RULES
from dkv.bench.options import Options
from dkv.bench.shapes import as_loaded, random_model, shape, tiny
from dkv.bench.speed import blocks
from dkv.tools.verify import FAST_DLLM, find_cases

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [case for case in find_cases(GOLDEN) if "function" in case.facts]


@pytest.fixture(scope="module")
def model():
    return dkv.load(GOLDEN / "llada_mha", device="cpu", pack=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_baseline_gives_the_tokens_and_passes_of_the_published_code(case, model):
    facts, tensors = case.facts, case.tensors
    if facts["steps"] != facts["gen_length"] and facts["threshold"] is None:
        return  # the baseline fills one slot a step
    settings = {name: facts[name] for name in ("block_length", "threshold")}
    cache, prompt = FAST_DLLM[facts["function"]], tensors["prompt"].long()
    found, passes = fast_dllm.generate(model, prompt, new=facts["gen_length"], cache=cache, **settings)
    assert torch.equal(found, tensors["final"].long()) and passes == facts["forward_passes"]


SUFFIX = [case for case in find_cases(GOLDEN / "policies" / "llada_mha") if case.facts["policy"] == "suffix"]


@pytest.mark.parametrize("case", SUFFIX, ids=lambda case: case.name)
def test_the_baseline_sees_what_the_code_of_streaming_dllm_sees(case, model):
    facts, tensors = case.facts, case.tensors
    if facts["threshold"] is None or case.name.endswith("_end"):
        return  # several slots a step, or an end
    cache = dkv.SuffixWindow(facts["window"], facts["tail"])
    settings = {name: facts[name] for name in ("block_length", "threshold")} | {"threshold_decay": facts["alpha"]}
    found, passes = fast_dllm.generate(
        model, tensors["prompt"].long(), new=facts["gen_length"], cache=cache, **settings
    )
    assert torch.equal(found, tensors["final"].long()) and passes == facts["passes"]


def test_the_baseline_takes_one_row(model):
    with pytest.raises(ValueError, match="input_ids must be one row"):
        fast_dllm.generate(model, torch.zeros(2, 3).long(), new=4, block_length=2, cache=dkv.NoCache())


@pytest.fixture(scope="module")
def options() -> Options:
    plain = random_model(tiny(shape("llada-8b")), torch.device("cpu"), torch.float32)
    return Options("small", as_loaded(plain), plain, prompt=5, new=64, rounds=1)


def test_a_row_for_every_policy_and_rule(options, monkeypatch):
    monkeypatch.setattr(blocks, "RULES", {"one a step": {}, "threshold 0.9": {"threshold": 0.0}})
    monkeypatch.setattr(blocks, "BLOCK", 8)
    monkeypatch.setattr(blocks, "FLOOR_ROUNDS", 2)
    found = json.loads(json.dumps(blocks.measure(replace(options, new=16))))
    rows = {(row["policy"], row["rule"]): row for row in found["rows"]}
    assert list(rows) == [(policy, rule) for rule in RULES for policy in BLOCKED]
    for (policy, rule), row in rows.items():
        one = rule == "one a step"
        assert row["passes"] == (16 if one else 2) and row["tokens_per_forward"] == (1 if one else 8)
        assert row["same"] is (True if policy in blocks.PUBLISHED else None)
        assert (row["over_eager"] is None) == (policy not in blocks.PUBLISHED)
        assert (row["step_over_floor"] is not None) == one
    assert rows["dual", "one a step"]["computed_share"] < rows["prefix", "one a step"]["computed_share"] < 1
    for base in ("prefix", "dual"):
        wide = "suffix 96" + " dual" * (base == "dual")
        # Both blocks are in sight of the window.
        assert rows[wide, "one a step"]["computed_share"] == rows[base, "one a step"]["computed_share"]
    text = blocks.table(found)
    assert text.count("yes") == 8 and "NO" not in text and "step/floor" in text


def test_other_sizes_are_refused(options):
    with pytest.raises(ValueError, match="new must be a multiple of 32, the slots of a block, got 40"):
        blocks.measure(replace(options, new=40))
    with pytest.raises(ValueError, match="batch must be 1, as the published block policies take one prompt, got 2"):
        blocks.measure(replace(options, batch=2))
