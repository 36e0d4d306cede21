"""The parts of `dkv.bench.gpu` as processes: their order, their time, and that no end of one touches the others."""

import json
import subprocess
import sys
import time

import pytest

from dkv.bench.gpu import supervise as module
from dkv.bench.gpu.report import Report
from dkv.bench.gpu.supervise import PARTS, supervise

# In place of `python -m dkv.bench.gpu`: its arguments, and what the part of a name does after its first row.
CHILD = """
import json, os, signal, sys, time
part, share, until, path = sys.argv[3], *sys.argv[-2:], sys.argv[-4]
i, count = map(int, share.split("/"))
def write(finished):
    row = {"name": f"{part} {share}", "left": float(until) - time.monotonic()}
    content = {"finished": finished, "parts": {part: {"rows": [row], "left_out": [], "seconds": 1.0}}}
    with open(path + "~", "w") as file:
        json.dump(content, file)
    os.replace(path + "~", path)
write(False)
ways = {
    "hangs": lambda: time.sleep(60),
    "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "raises": lambda: 1 / 0,
    "fails": lambda: write(True) or sys.exit(1),
}
ways.get(json.loads(os.environ["WAYS"]).get(part), lambda: write(True))()
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """run({"steps": "dies"}) -> report, and the file; each process gets a row, and ends as it is told."""
    start = module._started
    monkeypatch.setattr(module, "_started", lambda words, path: start([words[0], "-c", CHILD, *words[1:]], path))
    monkeypatch.setattr(module, "GRACE", 0.3)
    monkeypatch.setattr(module, "STARTING", 0.0)

    def go(ways=None, parts=tuple(PARTS), seconds=60.0, on_gpu=False):
        monkeypatch.setenv("WAYS", json.dumps(ways or {}))
        path = tmp_path / "result.json"
        report = Report(str(path), {}, time.monotonic() + seconds)
        supervise(report, parts, ["--device=cpu"], on_gpu)
        return report, json.loads(path.read_text())["parts"]

    return go


def test_all_parts_run_in_their_order_and_share_the_time(run):
    report, parts = run(seconds=90.0)
    assert list(parts) == ["profile", "steps", "checks", "autotune", "ops", "more"] and not report.failed
    left = [part["rows"][0]["left"] for part in parts.values()]
    # Two of nine minutes; what is left over goes to those that follow, and the last one has all of it.
    assert 17 < left[0] < 20 and left[-1] > 70
    assert all(part["problems"] == [] and part["seconds"] == 1.0 for part in parts.values())


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("hangs", "still at work"),
        ("dies", "died of SIGSEGV"),
        ("raises", "ZeroDivisionError: division by zero"),
        ("fails", None),
    ],
)
def test_a_part_that_goes_wrong_leaves_its_rows_and_the_others(run, way, said):
    seconds = 1.5 if way == "hangs" else 60.0
    report, parts = run({"steps": way}, ("steps", "checks"), seconds)
    assert report.failed and parts["steps"]["rows"][0]["name"] == "steps 0/1"
    assert [said in problem for problem in parts["steps"]["problems"]] == ([] if said is None else [True])
    assert parts["checks"]["rows"] and parts["checks"]["problems"] == []


def test_several_processes_share_a_part(run, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(5))
    _, parts = run(parts=("checks", "autotune", "ops"), on_gpu=True)
    assert [row["name"] for row in parts["checks"]["rows"]] == ["checks 0/3", "checks 1/3", "checks 2/3"]
    # Candidates are compiled side by side and timed one by one.
    shares = [row["name"] for row in parts["autotune"]["rows"]]
    assert shares == ["autotune 0/3", "autotune 1/3", "autotune 2/3", "autotune 0/1"]
    assert [row["name"] for row in parts["ops"]["rows"]] == ["ops 0/1"]


def test_what_a_part_has_measured_is_written_while_it_runs(run, tmp_path, monkeypatch):
    seen, sleep = [], time.sleep

    def looked(seconds):
        sleep(seconds)
        seen.append(json.loads((tmp_path / "result.json").read_text())["parts"].get("steps", {}).get("rows", []))

    monkeypatch.setattr(module.time, "sleep", looked)
    run({"steps": "hangs"}, ("steps",), 3.0)
    assert seen[-1] and seen[-1][0]["name"] == "steps 0/1"


def test_a_part_without_time_is_named(run, monkeypatch):
    monkeypatch.setattr(module, "STARTING", 5.0)
    _, parts = run(parts=("steps", "checks"), seconds=1.0)
    assert [part["problems"] for part in parts.values()] == [["left out: no time was left"]] * 2


def test_a_process_ends_with_the_one_that_started_it():
    code = "import time; from dkv.bench.gpu.supervise import end_with_the_parent as end; end(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    child.stdin.close()
    assert child.wait(timeout=30) == 130
