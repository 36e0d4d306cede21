"""`python -m dkv.bench.gpu`: rehearsed on the CPU, and its checks, which must notice what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dkv.bench import machine
from dkv.bench.gpu import __main__ as gpu
from dkv.bench.gpu import cases, checks, report
from dkv.bench.gpu.checks import CHECKS, run_check
from dkv.bench.gpu.tools import Skipped
from dkv.kernels.common.backend import interpreted
from tests.bench.conftest import fast

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def rehearse(*words: str, path: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """The script in a process of its own, without Triton's interpreter, and what it wrote."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DKV_BACKEND")}
    command = [sys.executable, "-m", "dkv.bench.gpu", "--device", "cpu", "--json", str(path), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    return done, json.loads(path.read_text())


@pytest.mark.slow
def test_a_rehearsal_in_a_process_of_its_own(tmp_path):
    done, found = rehearse("--layers", "1", path=tmp_path / "result.json")
    assert done.returncode == 0, done.stdout + done.stderr
    check(found, done.stdout)
    checks = found["parts"]["checks"]["rows"]
    assert [row["name"] for row in checks] == list(CHECKS) and {row["verdict"] for row in checks} == {"PASS", "SKIP"}
    assert all("GPU" in row["found"] for row in checks if row["verdict"] == "SKIP")


@pytest.fixture
def torch_alone(monkeypatch):
    """No Triton interpreter, which takes minutes for a whole part, and a machine that is measured at once."""
    monkeypatch.setattr(gpu, "backends_on", lambda device: ["torch"])
    monkeypatch.setattr(machine, "rates", lambda *_: {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e9})


def test_a_rehearsal_goes_through_all_parts(torch_alone, monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    monkeypatch.setattr(checks, "CHECKS", {name: CHECKS[name] for name in ("commit", "cuda_graph")})
    assert gpu.main(["--device", "cpu", "--json", str(path), "--layers", "1"]) == 0
    found = json.loads(path.read_text())
    check(found, capsys.readouterr().out)
    rows = found["parts"]["checks"]["rows"]
    assert [(row["name"], row["verdict"]) for row in rows] == [("commit", "PASS"), ("cuda_graph", "SKIP")]


def check(found: dict, out: str) -> None:
    """What a rehearsal with one layer has written and said."""
    assert "REHEARSAL" in out
    facts = found["facts"]
    assert facts["rehearsal"] and facts["backends"] == ["torch"] and facts["torch"] == torch.__version__
    assert facts["command"].startswith("python -m dkv.bench.gpu --device cpu --json")
    assert found["finished"] and list(found["parts"]) == ["checks", "ops", "steps"]
    ops, steps = (found["parts"][part]["rows"] for part in ("ops", "steps"))
    assert all(not row["errors"] for row in ops)
    attention = next(row for row in ops if row["name"] == "attention full LLaDA-8B B1 S48")
    assert set(attention["ms"]) == {"torch", "eager", "sdpa"} and not attention["errors"]
    # Q and the output, K and V, float32, 48 slots of 4 heads of 16; two products of 48 x 48 x 16 per head.
    assert attention["bytes"] == 4 * 48 * 4 * 16 * 4 and attention["flops"] == 2 * 2 * 4 * 48 * 48 * 16
    best = min(("eager", "sdpa"), key=lambda name: attention["ms"][name]["median"])
    ratio = attention["ms"][best]["median"] / attention["ms"]["torch"]["median"]
    assert attention["best_other"] == best and attention["ratio_to_best_other"] == pytest.approx(ratio)
    assert [row["policy"] for row in steps] == ["plain", "decode 8", "greedy 4", "prefill"] * 4
    assert all(row["passes"] == 8 and row["warm"] for row in steps)
    assert [row["full_passes"] for row in steps[:4]] == [8, 2, 2, 1]
    assert steps[0]["computed_share"] == 1 and steps[1]["computed_share"] < 1
    assert {row["ratio_to_plain"] for row in steps if row["policy"] == "plain"} == {1.0}


def test_no_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    message = capsys.readouterr().err
    assert "no CUDA or ROCm device" in message and "--device cpu" in message


@pytest.mark.parametrize("words", [["check"], ["--layers", "0"], ["--minutes", "0"], ["--model", "gpt"]])
def test_wrong_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu", *words])
    assert stopped.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_what_time_does_not_allow_is_named(torch_alone, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert gpu.main(["--device", "cpu", "--minutes", "1e-9", "--json", str(path)]) == 0
    parts = json.loads(path.read_text())["parts"]
    assert [part["rows"] for part in parts.values()] == [[], [], []]
    assert parts["checks"]["left_out"] == list(CHECKS)
    assert "LLaDA-8B B1 S48 decode 8 on torch" in parts["steps"]["left_out"]
    assert "time is up" in capsys.readouterr().out


def test_an_error_stays_in_its_row(torch_alone, monkeypatch, tmp_path, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fast("rope_scatter_"), "rope_scatter_", broken)
    path = tmp_path / "result.json"
    words = ["--device", "cpu", "--json", str(path), "--model", "llada", "--only", "cached LLaDA-8B B1", "ops"]
    assert gpu.main(words) == 1
    rows = {row["name"].split()[0]: row for row in json.loads(path.read_text())["parts"]["ops"]["rows"]}
    assert rows["rope_scatter"]["errors"] == {"torch": "RuntimeError: no such kernel"}
    assert list(rows["rope_scatter"]["ms"]) == ["eager"]
    assert not rows["attention"]["errors"] and "torch" in rows["attention"]["ms"]
    assert gpu.main(["--device", "cpu", "--json", str(path), "--only", "dream_decode", "checks"]) == 1
    assert json.loads(path.read_text())["parts"]["checks"]["rows"][0]["verdict"] == "FAIL"
    assert gpu.main(["--device", "cpu", "--json", str(path), "--only", "LLaDA-8B B1 S48 decode", "steps"]) == 1
    assert "no such kernel" in json.loads(path.read_text())["parts"]["steps"]["rows"][0]["error"]


def test_a_killed_run_leaves_its_rows(tmp_path):
    path = tmp_path / "result.json"
    own = report.Report(str(path), {"card": "none"})
    own.begin("ops", "title")
    own.row("a line", {"name": "first"})
    found = json.loads(path.read_text())
    assert not found["finished"] and found["parts"]["ops"]["rows"] == [{"name": "first"}]


def wrong(operation: str):
    """A torch operation that is off in its last row."""
    right = getattr(fast(operation), operation)

    def run(*args, **kwargs):
        found = right(*args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        if first.dtype == torch.bool:
            first.logical_not_()
        elif first.numel():
            first[-1] += 1
        return found

    return run


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        ("cached_attention", "attention_bfloat16"),
        ("cached_attention", "attention_rules"),
        ("rope_scatter_", "rope_scatter_float16"),
        ("choose_token", "choose_token_entropy"),
        ("choose_token", "choose_token_tail"),
        ("choose_token", "choose_token_filters"),
        ("choose_token_fused", "choose_token_fused_float32"),
        ("commit_", "commit"),
    ],
)
def test_a_wrong_operation_is_noticed(monkeypatch, operation, check):
    run_check(check, CPU, "torch")
    monkeypatch.setattr(fast(operation), operation, wrong(operation))
    with pytest.raises((AssertionError, RuntimeError)):
        run_check(check, CPU, "torch")


@pytest.mark.parametrize("operation", ["cached_attention", "rope_scatter_"])
def test_what_is_read_or_written_beside_a_tensor_is_noticed(monkeypatch, operation):
    right = getattr(fast(operation), operation)

    def careless(*given, **hints):
        found, q = right(*given, **hints), given[0]
        if operation == "cached_attention" and q._base is not None:
            found[0].add_(q._base.flatten()[0])
        elif operation == "rope_scatter_" and (v_buf := given[7])._base is not None:
            v_buf._base.flatten()[0] = 0
        return found

    monkeypatch.setattr(fast(operation), operation, careless)
    with pytest.raises(AssertionError, match="differ"):
        run_check("nothing_beside_a_tensor_is_used_float32", CPU, "torch")


def test_tokens_that_are_not_drawn_are_noticed(monkeypatch):
    right = fast("choose_token").choose_token

    def best(logits, choice, row_keys, **hints):
        return right(logits, replace(choice, temperature=0.0), None)

    monkeypatch.setattr(fast("choose_token"), "choose_token", best)
    for name in ("sampling_distribution", "drawn_tokens_are_those_of_the_definition"):
        with pytest.raises(AssertionError):
            run_check(name, CPU, "torch")


def test_error_is_a_share_of_the_largest_value_and_takes_no_nan():
    exact = torch.tensor([1.0, -4.0, -torch.inf], dtype=torch.float64)
    assert cases.error(exact.float(), exact) == 0 and cases.error(exact[:0], exact[:0]) == 0
    assert cases.error(torch.tensor([1.5, -4.0, -torch.inf]), exact) == 0.125
    assert cases.error(torch.tensor([1.0, torch.nan, -torch.inf]), exact) > 1e30
    assert cases.error(torch.tensor([1.0, -4.0, 0.0]), exact) > 1e30
    assert cases.error(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5


# Those that the interpreter makes in seconds.
@pytest.mark.parametrize(
    "name",
    [
        "attention_bfloat16",
        "rope_scatter_float32",
        "integers_of_both_widths",
        "choose_token_tail",
        "wrong_index_is_refused_before_the_launch_9",
        "nothing_beside_a_tensor_is_used_float32",
    ],
)
def test_checks_pass_in_the_interpreter(name):
    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    try:
        run_check(name, CPU, "triton")
    except Skipped as reason:
        pytest.skip(str(reason))
