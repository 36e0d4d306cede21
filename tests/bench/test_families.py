"""The published loops in eager PyTorch: the tokens of dkv, at the cost of the recorded runs."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dkv
from dkv.bench import shapes
from dkv.bench.baselines import families
from dkv.bench.shapes import shape, tiny
from dkv.bench.speed import families as measured
from dkv.bench.speed import gemma
from dkv.tools.verify import find_cases
from dkv.tools.verify_families import LOOPS

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
# The baseline has no guidance.
CASES = [
    case
    for case in find_cases(GOLDEN)
    if case.facts["kind"] == "generate" and "canvas_length" not in case.settings and not case.settings.get("cfg_scale")
]
# What the names of runs hold that end at an end token, where the baseline goes on.
ENDS = ("eos", "stop", "end", "early")

# By what loops differ.
KINDS = ("variant", "mode", "sampler")


def marked() -> list:
    """The cases; but for one of each loop and network they are slow."""
    seen, found = set(), []
    for case in CASES:
        kind = (case.folder, *(case.facts.get(name) for name in KINDS), case.settings.get("use_block_cache"))
        marks = [pytest.mark.slow] if kind in seen else []
        found.append(pytest.param(case, marks=marks, id=f"{case.folder.name}/{case.name}"))
        seen.add(kind)
    return found


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaded():
    return functools.cache(lambda folder: dkv.load(folder, device="cpu", pack=False))


@pytest.mark.parametrize("case", marked())
def test_the_tokens_of_dkv_at_the_cost_of_the_published_loop(case, loaded):
    known, model = {**case.facts, **case.settings}, loaded(case.folder)
    recorded = next(loop for name, loop in LOOPS.items() if name in known)(case, case.tensors)
    settings = {name: value for name, value in recorded.settings.items() if name != "cfg_scale"}
    new = settings.pop("max_new_tokens", None) or settings.pop("gen_length")
    # The recorded canvas of Fast-dLLM v2 has the first token of a block that was not decoded.
    new -= "small_block_size" in known
    own, model.spec = model.spec, replace(model.spec, **recorded.spec)
    try:
        for prompt in recorded.prompts:
            ids = prompt[None].long()
            found, passes, slots = families.generate(model, ids, new=new, **settings)
            output = dkv.generate(model, ids, max_new_tokens=new, eos_token_id=[], **settings)
            assert torch.equal(found, output.sequences) and passes >= output.stats.passes
            if not any(word in case.name for word in ENDS):
                assert passes == case.facts["forwards"]
                assert slots == case.facts.get("positions_published", slots)
    finally:
        model.spec = own


def test_what_no_published_loop_has_is_refused(loaded):
    model, ids = loaded(GOLDEN / "sdar" / "sdar_tiny"), torch.tensor([[5, 3, 1]])
    with pytest.raises(ValueError, match="input_ids must be one row"):
        families.generate(model, ids.repeat(2, 1), new=4)
    with pytest.raises(ValueError, match="cache must be none, or dual"):
        families.generate(model, ids, new=4, cache="decode")


def test_a_line_for_every_way_to_generate(monkeypatch):
    sizes = tiny(shape("d128x4"))
    monkeypatch.setattr(shapes, "EXPERTS", 16)
    found = json.loads(json.dumps(measured.measure(sizes, list(measured.CASES), prompt=5, new=16, rounds=1)))
    rows = {(row["family"], row["policy"]): row for row in found["rows"]}
    assert list(rows) == [(name, way) for name, case in measured.CASES.items() for way in case.ways]
    for (name, way), row in rows.items():
        first = way == next(iter(measured.CASES[name].ways))
        assert row["same"] is (True if first else None)
        assert row["speed"] > 0 and row["seconds"] > 0
        assert row["slots"] <= row["eager_slots"] or way.startswith("dual ")
    # Two blocks are filled, the first from its fifth slot on.
    blocks = rows["blocks of 32", "none"]
    assert (blocks["passes"], blocks["slots"], blocks["eager_slots"]) == (4, 128, 128)
    text = measured.table(found)
    assert text.count("yes") == len(measured.CASES) and "NO" not in text


def test_what_is_no_family_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["families", "LLaDA3"])
    with pytest.raises(SystemExit):
        measured.main()
    assert "unknown family 'LLaDA3'; known are LLaDA2.0" in capsys.readouterr().err


def test_both_make_all_steps_of_a_canvas(monkeypatch):
    pytest.importorskip("transformers", minversion="5.24")
    monkeypatch.setattr(gemma, "EXPERTS", 8)
    found = gemma.measure(shape("d128x4", 2), prompt=5, canvas=8, steps=3, rounds=1)
    (row,) = found["rows"]
    assert row["seconds"] > 0 and row["eager_seconds"] / row["seconds"] == pytest.approx(row["speed"])
    assert "8 slots, 3 steps" in gemma.table(found)
