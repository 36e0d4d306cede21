"""Standard input, output and error that are closed, full, read by nobody, or of ASCII."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dkv.cli import main
from dkv.tools.streaming import drawable

ROOT = Path(__file__).parents[3]
PROMPT = "+1 +2 -3="


def shell(folder: Path, line: str, **changes: str) -> subprocess.CompletedProcess:
    """A line of bash; `dkv` stands for this Python's."""
    line = f'dkv() {{ "{sys.executable}" -m dkv "$@"; }}; {line}'
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    env = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, text=True, capture_output=True, timeout=300)


SHORT = {
    "help": "--help",
    "info": "info",
    "generate": f"generate --max-new-tokens 4 '{PROMPT}'",
    "trace": f"trace --max-new-tokens 4 '{PROMPT}'",
    "demo": "demo --problems 1",
    "bench": "bench --shape d128x4 --prompt 4 --new 4 --rounds 1 --no-eager --policies plain",
    "eval": "eval --tasks balance --problems 1 --run steps=quarter",
    "suggest": "suggest --tasks balance --problems 1 --run steps=quarter",
    "verify": f"verify {ROOT / 'tests/golden/llada_maskpred'}",
    "audit": "audit --quick --op commit --arch sm_80 --jobs 1",
}
# What a process does with its streams is the same for all commands; what each writes into them is not, and is below.
STREAMS = pytest.mark.parametrize(
    ("command", "unbuffered"), [("help", ""), ("help", "1"), pytest.param("generate", "", marks=pytest.mark.slow)]
)
LONGER = ("demo", "audit")


@STREAMS
def test_nobody_reads_the_output(tmp_path, command, unbuffered):
    """The reader has gone before the first line: the command ends, and says nothing."""
    line = (
        f"exec 3> >(:); sleep 0.5; dkv {SHORT[command]} >&3 2> err; echo $?; grep -v -e ' of ' -e 'machine is busy' err"
    )
    done = shell(tmp_path, line, PYTHONUNBUFFERED=unbuffered)
    assert (done.stdout, done.stderr) == ("141\n", "")


@STREAMS
def test_standard_output_is_closed_or_full(tmp_path, command, unbuffered):
    done = shell(tmp_path, f"dkv {SHORT[command]} >&-", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "dkv: error: standard output is closed: give it a file, a pipe or /dev/null\n"
    done = shell(tmp_path, f"dkv {SHORT[command]} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    check_full(command, done.returncode, done.stderr)


def check_full(command: str, code: int, err: str) -> None:
    name = "dkv" if command == "help" else f"dkv {command}"
    *others, last = err.splitlines()
    assert code == 2 and last == f"{name}: error: standard output: No space left on device"
    assert all(" of " in line or "machine is busy" in line for line in others)


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow) if name in LONGER else name for name in SHORT]
)
def test_what_a_command_writes_may_fail_at_its_first_line(tmp_path, monkeypatch, capsys, folder, command):
    """In this process: a pipe that nobody reads, and a device that is full; at last a terminal of ASCII."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(SHORT[command])
    words += ["--model", str(folder)] if command in ("generate", "trace", "demo", "eval") else []

    def run(number: int, **how: object) -> tuple[int, str]:
        stream = io.TextIOWrapper(os.fdopen(number, "wb", 0), errors="backslashreplace", **how)
        with stream, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stream)
            code = main(words)
        return code, capsys.readouterr().err

    reader, writer = os.pipe()
    os.close(reader)
    code, err = run(writer, write_through=True)
    assert code == 141 and all(" of " in line or "machine is busy" in line for line in err.splitlines())
    check_full(command, *run(os.open("/dev/full", os.O_WRONLY), write_through=True))
    assert run(os.open("out.txt", os.O_WRONLY | os.O_CREAT), encoding="ascii")[0] == 0
    assert Path("out.txt").read_bytes().isascii() and Path("out.txt").read_text()


def test_the_other_streams_may_be_closed_and_the_terminal_have_ascii_alone(tmp_path):
    ascii_alone = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(tmp_path, f"dkv {SHORT['generate']} <&- 2>&-", **ascii_alone)
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
        assert shell(tmp_path, f"dkv generate --file nowhere {stderr}").returncode == 2


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["", "C"])
def test_a_prompt_of_bytes_that_are_not_text(tmp_path, locale):
    (tmp_path / "prompt").write_bytes(b"1=\xff\n")
    for line, source in (
        ("dkv generate $'1=\\xff'", "PROMPT"),
        ("dkv generate < prompt", "standard input"),
        ("dkv generate --lines < prompt", "standard input"),
        ("dkv generate --file prompt", "prompt"),
        ("dkv trace --file prompt", "prompt"),
    ):
        done = shell(tmp_path, line, **locale)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.lower() == f"{' '.join(line.split()[:2])}: error: {source} is not text in utf-8\n".lower()


def test_an_argument_that_ascii_made_of_utf8_is_utf8(folder, capsys):
    """The bytes are those of an é, which the model does not know, not of what ASCII makes of them."""
    assert main(["generate", "--model", str(folder), b"1\xc3\xa9=".decode("ascii", "surrogateescape")]) == 2
    assert "the model has no token for 'é'" in capsys.readouterr().err


@pytest.mark.slow
def test_text_is_utf8_whatever_the_terminal_has(tmp_path):
    done = shell(tmp_path, "dkv generate 1é=", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2 and "the model has no token for '\\xe9'" in done.stderr
