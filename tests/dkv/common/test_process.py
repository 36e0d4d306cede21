"""Commands as processes: interrupted at any moment, with closed pipes and streams, in a terminal of ASCII."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dkv.cli import main
from dkv.common import process
from dkv.kernels.common.backend import has_triton
from dkv.tools.streaming import drawable

ROOT = Path(__file__).parents[3]
PROMPT = "+1 +2 -3="
# Commands that are at work for a while, and the name by which they speak.
LONG = {
    "info": ("dkv", "info"),
    "generate": ("dkv", "generate", "--max-new-tokens", "400", PROMPT),
    "trace": ("dkv", "trace", "--max-new-tokens", "400", "--out", "out", "--json", "out/t.json", PROMPT),
    "demo": ("dkv", "demo"),
    "bench": ("dkv", "bench", "--json", "out/b.json", "--csv", "out/b.csv"),
    "eval": ("dkv", "eval", "--json", "out/e.json", "--out", "out"),
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
NAMES = {"gpu": "python -m dkv.bench.gpu", "train": "python -m dkv.models.bundled.train",
         "lm_eval": "python -m dkv.lm_eval"}  # fmt: skip


def environment(folder: Path, **changes: str) -> dict[str, str]:
    unset = ("TRITON_INTERPRET", "PYTHONUNBUFFERED", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    (folder / "tmp").mkdir(exist_ok=True)
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), **changes}


def start(folder: Path, *words: str) -> subprocess.Popen:
    """A command that has begun."""
    running = subprocess.Popen(
        [sys.executable, "-c", BEGIN, *words], cwd=folder, env=environment(folder), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Where the tests run in the background, the shell has interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stderr.readline() == "begun\n"
    return running


def check_interrupted(folder: Path, command: str, running: subprocess.Popen) -> str:
    """Interrupt a command, and return what it said at last."""
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, (running.returncode, out, err)
    # Before the arguments are read, it is dkv as a whole.
    names = (NAMES.get(command, f"dkv {command}"), "dkv")
    said = [line for line in err.splitlines() if line.startswith(tuple(f"{name}: interrupted" for name in names))]
    assert len(said) == 1 and err.endswith(f"{said[0]}\n") and "Traceback" not in out + err
    assert [path for path in folder.rglob("*") if path.suffix == ".part" or "dkv-" in path.name] == []
    return said[0]


@pytest.mark.parametrize("command", LONG)
def test_an_interrupt_at_the_start(tmp_path, command):
    """While torch and the others are imported, which takes seconds."""
    running = start(tmp_path, *LONG[command])
    time.sleep(random.random())
    check_interrupted(tmp_path, command, running)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("command", LONG)
def test_an_interrupt_at_any_moment(tmp_path, command, seed):
    running = start(tmp_path, *LONG[command])
    time.sleep(random.Random(f"{command} {seed}").random() * 3**seed)
    if running.poll() is None:
        check_interrupted(tmp_path, command, running)


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
        [sys.executable, "-c", code, how], cwd=folder, env=environment(folder), text=True, capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("finalizer", 130, "dkv test: interrupted\n"), ("handler", 130, "dkv test: interrupted\n"),
        ("twice", 130, "dkv test: interrupted\n"), ("other_thread", 130, "dkv test: interrupted\n"),
        ("note", 130, "dkv test: interrupted; 3 runs are kept in x\n"), ("teardown", 0, ""),
    ],
)  # fmt: skip
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
def test_what_is_kept_is_said(tmp_path):
    """`dkv bench` has written the measurement that is done, and `dkv eval` goes on where it was."""
    words = ("dkv", "bench", "--shape", "d128x4", "--prompt", "8", "--new", "16", "--no-eager", "--policies", "plain",
             "--rounds", "1", "--json", "b.json", "--batch", *map(str, range(1, 60)))  # fmt: skip
    running = start(tmp_path, *words)
    while not (tmp_path / "b.json").exists():
        time.sleep(0.05)
    assert check_interrupted(tmp_path, "bench", running) == (
        "dkv bench: interrupted; finished measurements are kept in b.json"
    )
    assert len(json.loads((tmp_path / "b.json").read_text())["comparison"]["rows"]) >= 1
    words = ("dkv", "eval", "--problems", "16", "--tasks", "balance", "--run", "steps=half,quarter", "--batch", "1",
             "--out", "out")  # fmt: skip
    running = start(tmp_path, *words)
    log = tmp_path / "out" / "runs.jsonl"
    while not log.exists() or log.read_text().count("\n") < 4:
        time.sleep(0.05)
    said = check_interrupted(tmp_path, "eval", running)
    lines = log.read_text().splitlines()
    kept = len(lines) - 1
    assert said == f"dkv eval: interrupted; {kept} finished batches kept in out/runs.jsonl: repeat the command to go on"
    assert all(json.loads(line) for line in lines)
    running = start(tmp_path, *words)
    assert running.wait() == 0 and log.read_text().splitlines()[: kept + 1] == lines


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_audit_that_is_stopped_leaves_neither_files_nor_processes(tmp_path, number):
    running = start(tmp_path, "dkv", "audit", "--jobs", "2", "--op", "attention")
    while len(list((tmp_path / "tmp").glob("dkv-audit-*/1/cache/*"))) < 1:
        time.sleep(0.05)
        assert running.poll() is None
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    workers = [pid for pid in pids if _parent(pid) == running.pid]
    running.send_signal(number)
    assert running.wait(60) == (130 if number == signal.SIGINT else -number)
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list((tmp_path / "tmp").iterdir()) == []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def shell(folder: Path, line: str, **changes: str) -> subprocess.CompletedProcess:
    """A line of bash; `dkv` stands for this Python's."""
    line = f'dkv() {{ "{sys.executable}" -m dkv "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment(folder, **changes), text=True,
                          capture_output=True, timeout=300)  # fmt: skip


SHORT = {
    "help": "--help",
    "info": "info",
    "generate": f"generate --max-new-tokens 4 '{PROMPT}'",
    "trace": f"trace --max-new-tokens 4 '{PROMPT}'",
    "demo": "demo --problems 1",
    "bench": "bench --shape d128x4 --prompt 4 --new 4 --rounds 1 --no-eager --policies plain",
    "eval": "eval --tasks balance --problems 1 --run steps=quarter",
    "verify": f"verify {ROOT / 'tests/golden/llada_maskpred'}",
    "audit": "audit --quick --op rows --arch sm_80 --jobs 1",
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SHORT if name not in ("help", "generate")]


@pytest.mark.parametrize("command", ["help", "generate", *SLOW])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_output(tmp_path, command, unbuffered):
    """The reader has gone before the first line: the command ends, and says nothing."""
    line = (
        f"exec 3> >(:); sleep 0.5; dkv {SHORT[command]} >&3 2> err; echo $?; grep -v -e ' of ' -e 'machine is busy' err"
    )
    done = shell(tmp_path, line, PYTHONUNBUFFERED=unbuffered)
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize("command", ["help", "generate", *SLOW])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_is_closed_or_full(tmp_path, command, unbuffered):
    done = shell(tmp_path, f"dkv {SHORT[command]} >&-", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "dkv: error: standard output is closed: give it a file, a pipe or /dev/null\n"
    done = shell(tmp_path, f"dkv {SHORT[command]} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    name = "dkv" if command == "help" else f"dkv {command}"
    *others, last = done.stderr.splitlines()
    assert done.returncode == 2 and last == f"{name}: error: standard output: No space left on device"
    assert all(" of " in line or "machine is busy" in line for line in others)


@pytest.mark.parametrize("command", ["generate", *SLOW])
def test_the_other_streams_may_be_closed_and_the_terminal_have_ascii_alone(tmp_path, command):
    ascii_alone = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(tmp_path, f"dkv {SHORT[command]} <&- 2>&-", **ascii_alone)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.isascii() and done.stdout


def test_masks_are_drawn_with_what_the_terminal_has():
    assert drawable("1░░2é", io.TextIOWrapper(io.BytesIO(), "utf-8")) == "1░░2é"
    assert drawable("1░░2é", io.TextIOWrapper(io.BytesIO(), "ascii")) == "1##2é"
    assert drawable("░", io.StringIO()) == "░"


def test_no_input_and_a_failing_message(tmp_path):
    done = shell(tmp_path, "dkv generate <&-")
    assert (done.returncode, done.stderr) == (2, "dkv generate: error: no prompt: standard input is empty\n")
    for stderr in ("2>&-", "2>/dev/full"):
        assert shell(tmp_path, f"dkv generate --nonsense {stderr}").returncode == 2
        assert shell(tmp_path, f"dkv generate --max-new-tokens -1 1= {stderr}").returncode == 2


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["", "C"])
def test_a_prompt_of_bytes_that_are_not_text(tmp_path, locale):
    (tmp_path / "prompt").write_bytes(b"1=\xff\n")
    for line, source in (
        ("dkv generate $'1=\\xff'", "PROMPT"), ("dkv generate < prompt", "standard input"),
        ("dkv generate --lines < prompt", "standard input"), ("dkv generate --file prompt", "prompt"),
        ("dkv trace --file prompt", "prompt"),
    ):  # fmt: skip
        done = shell(tmp_path, line, **locale)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.lower() == f"{' '.join(line.split()[:2])}: error: {source} is not text in utf-8\n".lower()


def test_text_is_utf8_whatever_the_terminal_has(tmp_path):
    """The bytes are those of an é, which the model does not know, not of what ASCII makes of them."""
    done = shell(tmp_path, "dkv generate 1é=", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2 and "the model has no token for '\\xe9'" in done.stderr


def test_arguments_that_no_shell_can_give(capsys):
    assert main(["generate", "1=\0"]) == main(["info", "--model\0"]) == 2
    assert capsys.readouterr().err.count("error: an argument holds a NUL character") == 2


@pytest.mark.parametrize("device", ["meta", "mps", "hpu", "cpu:-1", "cuda:99", ""])
@pytest.mark.parametrize("words", [["generate", "1="], ["trace", "1="], ["bench"], ["bench", "--shape", "d128x4"]])
def test_a_device_that_holds_no_numbers(capsys, tmp_path, monkeypatch, words, device):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--device", device]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    why = "holds no weights" if device == "meta" else "cannot be used here ("
    assert f"device={device!r} {why}" in line and len(line) < 250
