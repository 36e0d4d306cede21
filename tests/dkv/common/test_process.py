"""Commands as processes that are interrupted at any moment."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dkv.common import process
from dkv.kernels.common.backend import has_triton
from tests.processes import FORKS, ROOT, Fork, environment, python

PROMPT = "+1 +2 -3="
# Commands that are at work for a while, and the name by which they speak.
LONG = {
    "info": ("dkv", "info"),
    "generate": ("dkv", "generate", "--max-new-tokens", "400", PROMPT),
    "trace": ("dkv", "trace", "--max-new-tokens", "400", "--out", "out", "--json", "out/t.json", PROMPT),
    "demo": ("dkv", "demo"),
    "bench": ("dkv", "bench", "--json", "out/b.json", "--csv", "out/b.csv"),
    "eval": ("dkv", "eval", "--json", "out/e.json", "--out", "out"),
    "suggest": ("dkv", "suggest", "--json", "out/s.json", "--out", "out"),
    "verify": ("dkv", "verify", str(ROOT / "tests/golden")),
    "audit": ("dkv", "audit"),
    "gpu": ("dkv.bench.gpu", "--device", "cpu", "--json", "out/g.json"),
    "train": ("dkv.models.bundled.train", "tiny", "--out", "out"),
    "lm_eval": ("dkv.lm_eval", "ls", "tasks"),
}
# Run a module as `python -m` does, and tell when it has made the process its own: before that the interpreter is
# starting, and dies of an interrupt in its way.
BEGIN = """
import os, runpy, sys
from dkv.common import process
begin, sys.argv = process.begin, sys.argv[1:]
def told(name):
    begin(name)
    os.write(2, b"begun\\n")
process.begin = told
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
NAMES = {
    "gpu": "python -m dkv.bench.gpu",
    "train": "python -m dkv.models.bundled.train",
    "lm_eval": "python -m dkv.lm_eval",
}


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(folder, "dkv", "info") -> Fork."""
    with python(tmp_path_factory.mktemp("forks"), FORKS) as server:
        yield lambda folder, *words: Fork(server, folder, words)
        server.stdin.close()


def check_interrupted(folder: Path, command: str, code: int, out: str, err: str) -> str:
    """What an interrupted command said at last; nothing half done is left."""
    assert code == 130, (code, out, err)
    # Before the arguments are read, it is dkv as a whole.
    names = (NAMES.get(command, f"dkv {command}"), "dkv")
    said = [line for line in err.splitlines() if line.startswith(tuple(f"{name}: interrupted" for name in names))]
    assert len(said) == 1 and err.endswith(f"{said[0]}\n") and "Traceback" not in out + err
    assert [path for path in folder.rglob("*") if path.suffix == ".part" or "dkv-" in path.name] == []
    return said[0]


# One for each way to begin.
BEGINNINGS = ("generate", "gpu", "train", "lm_eval")


@pytest.mark.parametrize(
    "command", [name if name in BEGINNINGS else pytest.param(name, marks=pytest.mark.slow) for name in LONG]
)
def test_an_interrupt_at_the_start(tmp_path, command):
    """While torch and the others are imported, which takes seconds."""
    running = python(tmp_path, BEGIN, *LONG[command])
    assert running.stderr.readline() == "begun\n"
    time.sleep(random.random())
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    check_interrupted(tmp_path, command, running.returncode, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("command", LONG)
def test_an_interrupt_at_any_moment(tmp_path, fork, command, seed):
    running = fork(tmp_path, *LONG[command])
    time.sleep(random.Random(f"{command} {seed}").random() * 8**seed / 4)
    code, out, err = running.ended(signal.SIGINT)
    if code:
        check_interrupted(tmp_path, command, code, out, err)


BUSY = """
import os, signal, sys, time
from dkv.common import process
process.begin("dkv test")
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
def finalizer():
    Swallows()
    time.sleep(5)
def handler():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except BaseException:
        pass
def twice():
    with process.undoing(lambda: os.kill(os.getpid(), signal.SIGINT) or open("undone", "w")):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
def teardown():
    import threading
    class Late:
        def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
            kill(pid, number)
    sys.late = Late()
def other_thread():
    import threading
    threading.Thread(target=lambda: (time.sleep(0.1), os.kill(os.getpid(), signal.SIGINT))).start()
def note():
    with process.keeping(lambda: "3 runs are kept in x"), process.keeping(lambda: ""):
        finalizer()
print("printed before")
process.run(globals()[sys.argv[1]])
"""


def busy(folder: Path, code: str, how: str, handler: signal.Handlers) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, how],
        cwd=folder,
        env=environment(folder),
        text=True,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )


INTERRUPTED = "dkv test: interrupted"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        *((how, 130, f"{INTERRUPTED}\n") for how in ("finalizer", "handler", "twice", "other_thread")),
        ("note", 130, f"{INTERRUPTED}; 3 runs are kept in x\n"),
        ("teardown", 0, ""),
    ],
)
def test_an_interrupt_is_not_swallowed(tmp_path, how, code, said):
    """By a finalizer, by a handler of everything, while the first is at work, by the threads that the end waits for."""
    done = busy(tmp_path, BUSY, how, signal.SIG_DFL)
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "printed before\n")
    assert (tmp_path / "undone").exists() == (how == "twice")


def test_where_the_caller_ignores_interrupts_they_stay_ignored(tmp_path):
    """As a shell does for the jobs that it runs in the background."""
    done = busy(tmp_path, BUSY.replace("sleep(5)", "sleep(0.1)"), "finalizer", signal.SIG_IGN)
    assert (done.returncode, done.stderr) == (0, "")


def test_where_dkv_is_a_guest_its_signals_are_left_alone():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with process.undoing(lambda: None), process.keeping(lambda: "kept"):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    with pytest.raises(KeyboardInterrupt, match="kept"), process.keeping(lambda: "kept"):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_what_is_kept_is_said(tmp_path, fork):
    """`dkv bench` has written the measurement that is done, and `dkv eval` goes on where it was."""
    bench = "dkv bench --shape d128x4 --prompt 8 --new 16 --no-eager --policies plain --rounds 1 --json b.json --batch"
    running = fork(tmp_path, *bench.split(), *map(str, range(1, 60)))
    while not (tmp_path / "b.json").exists():
        time.sleep(0.05)
    assert check_interrupted(tmp_path, "bench", *running.ended(signal.SIGINT)) == (
        "dkv bench: interrupted; finished measurements are kept in b.json"
    )
    assert len(json.loads((tmp_path / "b.json").read_text())["comparison"]["rows"]) >= 1
    evaluation = "dkv eval --problems 3 --tasks balance --run steps=half,quarter --batch 1 --out out"
    (tmp_path / "err.txt").unlink()
    running = fork(tmp_path, *evaluation.split())
    log = tmp_path / "out" / "runs.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        time.sleep(0.05)
    said = check_interrupted(tmp_path, "eval", *running.ended(signal.SIGINT))
    lines = log.read_text().splitlines()
    kept = len(lines)
    assert said == f"dkv eval: interrupted; {kept} finished batches kept in out/runs.jsonl: repeat the command to go on"
    assert all(json.loads(line) for line in lines)
    assert fork(tmp_path, *evaluation.split()).ended()[0] == 0 and log.read_text().splitlines()[:kept] == lines


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_an_audit_that_is_stopped_leaves_neither_files_nor_processes(tmp_path, fork):
    running = fork(tmp_path, "dkv", "audit", "--jobs", "2", "--op", "attention")
    while len(list((tmp_path / "tmp").glob("dkv-audit-*/cache/*"))) < 1:
        time.sleep(0.05)
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    (worker,) = (pid for pid in pids if _parent(pid) == running.pid)
    forks = [pid for pid in pids if _parent(pid) == worker]
    assert running.ended(signal.SIGTERM)[0] == -signal.SIGTERM
    assert 1 <= len(forks) <= 2 and not any(_parent(pid) for pid in (worker, *forks))
    assert list((tmp_path / "tmp").iterdir()) == []


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it has ended."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent)
