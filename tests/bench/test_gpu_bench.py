"""`python -m dkv.bench.gpu`: rehearsed on the CPU, and its checks, which must notice what is wrong."""

import json
import os
import statistics
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from dkv import kernels
from dkv.bench import machine
from dkv.bench.gpu import __main__ as gpu
from dkv.bench.gpu import checks, profile, report, steps
from dkv.bench.gpu.alone import Recorder
from dkv.bench.gpu.checks import CHECKS, ordered
from dkv.bench.gpu.operations import OPERATIONS
from dkv.bench.gpu.supervise import PARTS
from dkv.engine import graphs
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
def test_a_rehearsal_goes_through_all_parts_in_their_order(tmp_path):
    done, found = rehearse("--layers", "1", path=tmp_path / "result.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REHEARSAL" in done.stdout and "what bounds a step" in done.stdout
    facts = found["facts"]
    assert facts["rehearsal"] and facts["backends"] == ["torch"] and facts["torch"] == torch.__version__
    assert facts["command"].startswith("python -m dkv.bench.gpu --device cpu --json")
    assert found["finished"] and list(found["parts"]) == list(PARTS)
    assert not any(part["problems"] for part in found["parts"].values())
    checks = found["parts"]["checks"]["rows"]
    assert [row["name"] for row in checks] == ordered() and {row["verdict"] for row in checks} == {"PASS", "SKIP"}
    assert all("GPU" in row["found"] for row in checks if row["verdict"] == "SKIP")
    assert found["parts"]["autotune"]["left_out"]


@pytest.fixture
def torch_alone(monkeypatch):
    """No Triton interpreter, which takes minutes for a whole part, and a machine that is measured at once."""
    monkeypatch.setattr(gpu, "backends_on", lambda device: ["torch"])
    monkeypatch.setattr(machine, "rates", lambda *_: {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e9})


@pytest.fixture
def measured(torch_alone, monkeypatch, tmp_path):
    """measured("ops", "--only", "norm") -> exit code, and the part as it was written."""

    monkeypatch.setattr(profile, "CALLS", 2)

    def run(part, *words):
        path = tmp_path / "result.json"
        code = gpu.main(["--device", "cpu", "--json", str(path), "--layers", "1", part, *words])
        found = json.loads(path.read_text())
        assert list(found["parts"]) == [part]
        return code, found["parts"][part]

    return run


def named(part: dict) -> dict[str, dict]:
    return {row["name"]: row for row in part["rows"]}


class Replays:
    """In place of CUDA graphs: the steps themselves, which count as replayed from the second of a shape on."""

    # For no other generation.
    free = False

    def __init__(self, engine):
        self.engine, self.met = weakref.proxy(engine), False

    def advance(self, shape):
        self.engine.stats.replayed_passes += self.met
        self.met = True
        return self.engine.advance(shape)


def test_profile_takes_a_step_apart(measured, monkeypatch, capsys):
    monkeypatch.setitem(graphs.RUNNERS, "cpu", Replays)
    code, part = measured("profile")
    rows = named(part)
    assert code == 0 and not any("error" in row or "errors" in row for row in part["rows"])
    # One layer of 64 wide, its MLP 96 wide, and a head of 256, float32: all but the embeddings.
    layer = 64 * (4 * 64 + 3 * 96) + 2 * 64
    assert rows["weights at copy bandwidth"]["bytes"] == 4 * (layer + 256 * 64 + 64)
    # A byte a weight and a scale an output, or half a byte and a scale for 32 inputs, where it was four.
    outputs, products = 3 * 64 + 64 + 2 * 96 + 64, 64 * (4 * 64 + 3 * 96)
    rounded = products + 4 * outputs + 256 * (64 + 4) + 4 * 3 * 64
    assert rows["int8 weights at copy bandwidth"]["bytes"] == rounded
    assert rows["int4 weights at copy bandwidth"]["bytes"] < rounded
    kinds = {"S48 full": None, "S48 cached N8": 8, "S48 cached N4": 4}
    kinds |= {"S48 cached N8 int8": 8, "S48 cached N8 int4": 8, "S48 full int8": None}
    for name, active in kinds.items():
        row = rows[name]
        assert row["active"] == active and {"host_ms", "waited_ms", "device_ms", "replay_host_ms"} <= set(row)
        # Queries, keys and values; the output; gate and up; down; and the head.
        assert row["alone_calls"]["products"] == 5 and row["alone_calls"]["cached_attention"] == 1
        assert set(row["alone_ms"]) == set(row["alone_calls"]) and all(ms > 0 for ms in row["alone_ms"].values())
    assert rows["kernels, S48 full"]["launches"] >= sum(k["launches"] for k in rows["kernels, S48 full"]["kernels"]) > 9
    assert set(rows["host, microseconds a call"]["us"]) == {"aten add_", "aten mm", *OPERATIONS}
    out = capsys.readouterr().out
    assert "S48 cached N4 / weights at copy bandwidth, at most" in out and "bound by" in out and "of bf16" in out


def test_profile_says_why_steps_are_not_replayed(measured):
    rows = named(measured("profile", "--only", "S48 full")[1])
    assert "no graphs" in rows["S48 full"]["eager_reason"] and rows["S48 full"]["alone_ms"]


def test_recorder_leaves_operations_as_they_were():
    with Recorder() as recorder:
        kernels.swiglu(torch.ones(2, 8))
    kernels.swiglu(torch.ones(2, 8))
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert {name: len(calls) for name, calls in recorder.calls.items()} == {"swiglu": 1}


def test_steps_compare_with_the_published_method(measured):
    code, part = measured("steps", "--model", "llada")
    rows = {(row["policy"], row["way"]): row for row in part["rows"]}
    ways = ("plain", "torch"), ("decode 8", "torch"), ("decode 8", "int8 weights"), ("decode 8", "int4 weights")
    others = ("decode 8", "published"), ("plain", "published")
    others += ("prefill", "torch"), ("greedy 4", "torch"), ("plain", "published, eager attention")
    assert code == 0 and list(rows) == [*ways, *others]
    assert all(row["passes"] == 8 and row["new_tokens"] == 8 and row["warm"] for row in rows.values())
    full = [rows[policy, "torch"]["full_passes"] for policy in ("plain", "decode 8", "greedy 4", "prefill")]
    assert full == [8, 2, 2, 1]
    plain = rows["plain", "torch"]
    assert plain["computed_share"] == 1 and rows["decode 8", "torch"]["computed_share"] < 1
    assert plain["ratio_to_plain"] == 1.0
    ratio = statistics.median(plain["seconds"]) / statistics.median(rows["decode 8", "published"]["seconds"])
    assert rows["decode 8", "published"]["ratio_to_plain"] == pytest.approx(ratio)


def test_more_is_the_other_model_and_batches(measured):
    _, part = measured("more")
    assert list(named(part)) == [
        f"{model} S48 {policy}"
        for model in ("Dream-7B B1", "LLaDA-8B B8", "Dream-7B B8")
        for policy in ("plain", "decode 8")
    ]


def test_ops_state_bytes_flops_and_the_best_other(measured):
    code, part = measured("ops")
    assert code == 0 and not any(row["errors"] for row in part["rows"])
    attention = named(part)["attention full LLaDA-8B B1 S48"]
    assert set(attention["ms"]) == {"torch", "eager", "sdpa"}
    # Q and the output, K and V, float32, 48 slots of 4 heads of 16; two products of 48 x 48 x 16 per head.
    assert attention["bytes"] == 4 * 48 * 4 * 16 * 4 and attention["flops"] == 2 * 2 * 4 * 48 * 48 * 16
    best = min(("eager", "sdpa"), key=lambda name: attention["ms"][name]["median"])
    ratio = attention["ms"][best]["median"] / attention["ms"]["torch"]["median"]
    assert attention["best_other"] == best and attention["ratio_to_best_other"] == pytest.approx(ratio)


def test_checks_say_what_they_skip(measured, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", {name: CHECKS[name] for name in ("commit", "cuda_graph")})
    _, part = measured("checks")
    assert [(row["name"], row["verdict"]) for row in part["rows"]] == [("cuda_graph", "SKIP"), ("commit", "PASS")]


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


def test_what_time_does_not_allow_is_named(measured, capsys):
    for part in PARTS:
        assert measured(part, "--minutes", "1e-9")[1]["rows"] == [], part
    assert measured("checks", "--minutes", "1e-9")[1]["left_out"] == ordered()
    assert "LLaDA-8B B1 S48 prefill by torch" in measured("steps", "--minutes", "1e-9")[1]["left_out"]
    assert "time is up" in capsys.readouterr().out


def test_an_error_stays_in_its_row(measured, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fast("rope_scatter_"), "rope_scatter_", broken)
    code, part = measured("ops", "--model", "llada", "--only", "cached LLaDA-8B B1")
    rows = {row["name"].split()[0]: row for row in part["rows"]}
    assert code == 1 and rows["rope_scatter"]["errors"] == {"torch": "RuntimeError: no such kernel"}
    assert list(rows["rope_scatter"]["ms"]) == ["eager"] and "broken" in rows["rope_scatter"]["tracebacks"]["torch"]
    assert not rows["attention"]["errors"] and "torch" in rows["attention"]["ms"]
    code, part = measured("checks", "--only", "dream_decode")
    assert code == 1 and part["rows"][0]["verdict"] == "FAIL" and "broken" in part["rows"][0]["traceback"]
    code, part = measured("steps", "--only", "plain")
    by_kernels, *published = part["rows"][3:]
    assert code == 1 and "no such kernel" in by_kernels["error"] and "broken" in by_kernels["traceback"]
    assert {row["way"] for row in published} == {"published", "published, eager attention"}
    code, part = measured("profile")
    failed = [row["name"] for row in part["rows"] if "traceback" in row]
    assert code == 1 and "S48 full" in failed and len(failed) < len(part["rows"])
    host = named(part)["host, microseconds a call"]
    assert list(host["errors"]) == ["rope_scatter_"] and "commit_" in host["us"]


def test_short_memory_is_told_and_is_no_failure(measured, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(steps.Bench, "run", full)
    code, part = measured("steps")
    assert code == 0 and all("OutOfMemory" in row["error"] for row in part["rows"])


def test_an_error_that_ends_a_part_is_told_with_its_traceback(measured, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such machine")

    monkeypatch.setattr(machine, "rates", broken)
    code, part = measured("ops")
    assert code == 1 and "in broken" in part["rows"][0]["traceback"] and "no such machine" in capsys.readouterr().out


def test_a_killed_run_leaves_its_rows(tmp_path):
    path = tmp_path / "result.json"
    own = report.Report(str(path), {"card": "none"})
    own.begin("ops", "title")
    own.row("a line", {"name": "first"})
    found = json.loads(path.read_text())
    assert not found["finished"] and found["parts"]["ops"]["rows"] == [{"name": "first"}]
