"""Commands as processes of their own, of which the second and all others begin at once."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Commands as forks of one process that has imported what takes seconds: a line of its input is a folder and a command.
FORKS = """
import json, os, runpy, sys, tempfile
import matplotlib.pyplot, torch, transformers
import dkv
from dkv.common import process
dkv.generate, dkv.map, dkv.load_tokenizer("tiny")
begin, answers = process.begin, os.dup(1)
def told(name):
    begin(name)
    os.write(answers, b"%d\\n" % os.getpid())
process.begin = told
for line in sys.stdin:
    folder, *sys.argv = json.loads(line)
    if not os.fork():
        break
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(os.wait()[1]))
else:
    sys.exit()
os.chdir(folder)
os.environ["TMPDIR"] = tempfile.tempdir = os.path.join(folder, "tmp")
for number, path in enumerate((os.devnull, "out.txt", "err.txt")):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
sys.stdin = open(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def environment(folder: Path) -> dict[str, str]:
    unset = ("TRITON_INTERPRET", "PYTHONUNBUFFERED", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    (folder / "tmp").mkdir(exist_ok=True)
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}


def python(folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", *words],
        cwd=folder,
        env=environment(folder),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background, the shell has interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


class Fork:
    """A command that has begun, as a fork of a process that has imported everything."""

    def __init__(self, server: subprocess.Popen, folder: Path, words: tuple[str, ...]):
        self.server, self.folder = server, folder
        (folder / "tmp").mkdir(exist_ok=True)
        print(json.dumps([str(folder), *words]), file=server.stdin, flush=True)
        self.pid = int(server.stdout.readline())

    def ended(self, number: int | None = None) -> tuple[int, str, str]:
        """Exit code and streams at the end, after a signal."""
        if number is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
        code = int(self.server.stdout.readline())
        return code, *((self.folder / f"{name}.txt").read_text() for name in ("out", "err"))
