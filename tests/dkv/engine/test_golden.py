"""The published code's recorded runs, replayed through the public API."""

from pathlib import Path

import pytest

import dkv
from dkv.tools.verify import check_case, find_cases

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [case for case in find_cases(GOLDEN) if not case.facts.keys() & {"policy", "kind"}]

# Runs that document a fault of the published code, with the fault.
DEFECTS = {
    "dream_gqa/decoded_right_n4_entropy_b1_nan": "a slot whose source is cached has no logits: softmax gives NaN",
    "llada_maskpred/decode_n3_b1_maskpred": "the mask token is emitted, its slot stays masked and its turn is lost",
    "llada_maskpred/origin_b1_maskpred": "the mask token is emitted, its slot stays masked and its turn is lost",
}


def name_of(case) -> str:
    return f"{case.folder.name}/{case.name}"


@pytest.fixture(scope="module")
def models():
    return {folder: dkv.load(folder, device="cpu") for folder in {case.folder for case in CASES}}


@pytest.mark.parametrize("case", [c for c in CASES if name_of(c) not in DEFECTS], ids=name_of)
def test_golden(case, models):
    check_case(case, models[case.folder])


def test_only_documented_defects_are_left_out():
    assert {name_of(case) for case in CASES if case.defect} == set(DEFECTS)
    assert len([case for case in CASES if "function" in case.facts]) == 35 and len(CASES) == 109 + 35


def test_defect_runs_are_right_where_the_published_code_is_not(models):
    """The run that emitted masks leaves none here; the rule that gave NaN is refused."""
    for case in (case for case in CASES if case.defect):
        t, model = case.tensors, models[case.folder]
        if case.facts["family"] == "llada":
            s = case.settings
            output = dkv.generate(
                model, t["prompt"].long(), gen_length=s["gen_length"], steps=s["steps"], block_length=s["block_length"]
            )
            assert not (output.sequences[:, t["prompt"].shape[1] :] == s["mask_id"]).any()
        else:
            with pytest.raises(ValueError, match="right"):
                dkv.generate(model, t["prompt"].long(), max_new_tokens=8, cache=dkv.DecodeCache(4, shift_rule="right"))
