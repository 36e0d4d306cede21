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
