"""`dkv verify` on recorded runs, tampered with or not."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]


@pytest.fixture
def golden_copy(tmp_path) -> Path:
    """Two recorded runs of one model, to be tampered with."""
    source, copy = ROOT / "tests/golden/llada_gqa", tmp_path / "llada_gqa"
    shutil.copytree(source, copy, ignore=lambda *_: ["cases"])
    (copy / "cases").mkdir()
    for name in ("origin_b2_blk2_half", "decode_n4_b1_patched"):
        for suffix in ("json", "safetensors"):
            shutil.copy(source / "cases" / f"{name}.{suffix}", copy / "cases")
    return copy


def test_verify(run, golden_copy):
    code, out, err = run("verify", golden_copy)
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 3)
    assert lines[0].startswith(
        "PASS llada_gqa/decode_n4_b1_patched  24 steps, 56% of the slots computed, logits within "
    )
    assert lines[-1] == "2 passed, 0 failed"
    assert run("verify", "--quiet", golden_copy) == (0, "2 passed, 0 failed\n", "")


def test_verify_tells_what_differs(run, golden_copy):
    recorded = golden_copy / "cases" / "origin_b2_blk2_half"
    tensors = load_file(recorded.with_suffix(".safetensors"))
    tensors["x_steps"][3, 1, 20] += 1
    save_file(tensors, recorded.with_suffix(".safetensors"))
    facts = golden_copy / "cases" / "decode_n4_b1_patched.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "mask_token_predictions": 1}))

    code, out, _ = run("verify", golden_copy)
    skip, fail, last = out.splitlines()
    assert code == 1
    assert skip.startswith("SKIP llada_gqa/decode_n4_b1_patched  the published run emits the mask token")
    assert fail.startswith("FAIL llada_gqa/origin_b2_blk2_half  Mismatch: step 3, row 1, column 20: token ")
    assert last == "0 passed, 1 failed, 1 skipped"
    assert run("verify", "-q", golden_copy)[:2] == (1, f"{fail}\n{last}\n")


@pytest.mark.parametrize(
    ("make", "message"), [(False, "no folder {}"), (True, "no recorded runs in {}: expected MODEL/config.json")]
)
def test_verify_without_cases(run, tmp_path, make, message):
    if make:
        (tmp_path / "x").mkdir()
    code, out, err = run("verify", tmp_path / "x")
    assert (code, out) == (2, "") and err.startswith(f"dkv verify: error: {message.format(tmp_path / 'x')}")


@pytest.fixture
def policies_copy(tmp_path) -> Path:
    """A recorded run of a newer policy, to be tampered with."""
    source, copy = ROOT / "tests/golden/policies/llada_gqa", tmp_path / "llada_gqa"
    shutil.copytree(source, copy, ignore=lambda *_: ["cases"])
    (copy / "cases").mkdir()
    for suffix in ("json", "safetensors"):
        shutil.copy(source / "cases" / f"sliding_cache_p7_g24_b6_t0.2_w0_m-1.{suffix}", copy / "cases" / f"x.{suffix}")
    return copy


def changed(name, at, value):
    def change(facts, tensors):
        tensors[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts, tensors: None, "PASS llada_gqa/x  21 passes, 45% of the slots computed"),
        (changed("x_steps", (4, 0, 9), 3), "Mismatch: step 4, row 0, column 9: token "),
        (changed("computed", (2, 0, 30), 1), "Mismatch: step 2, row 0, column 30: computed False, recorded True"),
        (changed("final", (0, 9), 3), "Mismatch: step 20, row 0, column 9: final token "),
        (lambda facts, tensors: facts.update(policy="later"), "ValueError: no policy 'later' is known here: known are"),
        (lambda facts, tensors: facts.pop("prefix_window"), "ValueError: the recorded run says nothing of 'prefix_win"),
        (lambda facts, tensors: tensors.pop("x_steps"), "ValueError: the recorded run has no tensor x_steps"),
        (lambda facts, tensors: tensors.pop("computed"), "ValueError: the recorded run has no set of slots"),
        (
            lambda facts, tensors: tensors.update(later=tensors["computed"]),
            "ValueError: no set 'later' is known here: known are computed",
        ),
        (
            lambda facts, tensors: tensors.update(computed=tensors["computed"][:9]),
            "ValueError: computed [9, 1, 31] does not fit x_steps [21, 1, 31]",
        ),
        (
            lambda facts, tensors: tensors.update({n: tensors[n][:9] for n in ("x_steps", "computed")}),
            "Mismatch: 21 passes, recorded 9",
        ),
    ],
)
def test_verify_of_newer_policies(run, policies_copy, change, message):
    facts, tensors = (policies_copy / "cases" / name for name in ("x.json", "x.safetensors"))
    own, values = json.loads(facts.read_text()), load_file(tensors)
    change(own, values)
    facts.write_text(json.dumps(own))
    save_file({name: value.clone() for name, value in values.items()}, tensors)
    code, out, _ = run("verify", policies_copy)
    found, last = out.splitlines()
    assert found.startswith(message if code == 0 else f"FAIL llada_gqa/x  {message}")
    assert last == ("1 passed, 0 failed" if code == 0 else "0 passed, 1 failed")


def test_verify_of_tensors_that_are_cut_off(run, policies_copy):
    tensors = policies_copy / "cases" / "x.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:500])
    code, out, _ = run("verify", policies_copy)
    assert code == 1 and "FAIL llada_gqa/x  ValueError: x.safetensors cannot be read: " in out


def test_verify_skips_what_documents_slips(run, policies_copy):
    facts = policies_copy / "cases" / "x.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "policy": "rollout", "published": True}))
    code, out, _ = run("verify", policies_copy)
    assert code == 0 and out.startswith("SKIP llada_gqa/x  the published run has two slips, which the runs called mend")
