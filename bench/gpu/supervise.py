"""Each part in a process of its own: what loses the device, hangs or dies ends one part, and never the others."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dkv.bench.gpu.report import Report
from dkv.common import process

# Seconds beyond its time after which a process is killed, for the item that it is at; and those that are too few to
# start one.
GRACE, STARTING = 20.0, 5.0
# How often it is looked at, in seconds.
EVERY = 0.2
# Cores that are left to this process and to the system.
SPARE_CORES = 2
STDIN = 0
# How much of its standard error is kept of a process that did not end by itself.
MOST_SAID = 4000


class Part(NamedTuple):
    """What a part may take of a run.

    Attributes:
        minutes: of all, of which it takes its share.
        processes: by stage, how many at most share the items on a GPU. What is not timed may run side by side: a
            kernel is compiled by the host on one core, and kept on the disk for all.
    """

    minutes: float
    processes: tuple[int, ...] = (1,)


# In the order in which they decide.
PARTS = {
    "profile": Part(2),
    "steps": Part(2.5),
    "checks": Part(1.75, (8,)),
    "autotune": Part(1.25, (12, 1)),
    "ops": Part(0.75),
    "more": Part(0.75),
}


class Child(NamedTuple):
    """A process, and the files of what it measures, always a whole one, and of its standard error."""

    run: subprocess.Popen
    path: Path
    errors: Path

    def part(self, name: str) -> dict[str, Any]:
        """What it has written of a part so far."""
        return self.content().get("parts", {}).get(name, {})

    def content(self) -> dict[str, Any]:
        with suppress(FileNotFoundError):
            return json.loads(self.path.read_text())
        return {}

    def problem(self, late: bool) -> str:
        """How it ended, where that was not by itself and at the end of its part; nothing otherwise."""
        code = self.run.wait()
        if late:
            ending = f"still at work {GRACE:.0f} s after its time: killed"
        elif code < 0:
            ending = f"died of {signal.Signals(-code).name}"
        # 1: a row tells what failed.
        elif code > 1 or not self.content().get("finished"):
            ending = f"ended before its end, with exit code {code}"
        else:
            return ""
        return f"{ending}\n{self.errors.read_text(errors='replace')[-MOST_SAID:]}".rstrip()


def supervise(report: Report, parts: Sequence[str], options: Sequence[str], on_gpu: bool) -> None:
    """Run parts one after the other; their results are in `report` as they come.

    Args:
        report: whose time is divided among the parts; what one leaves over goes to those that follow.
        options: of the command line, for each of them.
        on_gpu: stages may have several processes.
    """
    folder = Path(tempfile.gettempdir()) / f"dkv-{secrets.token_hex(8)}"
    running: list[Child] = []
    with process.undoing(partial(_end, running, folder)):
        try:
            folder.mkdir()
            for number, part in enumerate(parts):
                end = time.monotonic() + _share(report.left, parts[number:])
                stages = PARTS[part].processes if on_gpu else (1,)
                earlier: list[dict[str, Any]] = []
                for stage, most in enumerate(stages):
                    now, count = time.monotonic(), min(most, max(1, len(os.sched_getaffinity(0)) - SPARE_CORES))
                    until = now + (end - now) / (len(stages) - stage)
                    if until - now < STARTING:
                        report.content["parts"][part] = _merged([*earlier, {"problem": "left out: no time was left"}])
                        break
                    print(f"\n{part}: {until - now:.0f} s, {count} at work", flush=True)
                    words = [sys.executable, "-m", "dkv.bench.gpu", part, *options]
                    for i in range(count):
                        path = folder / f"{part}-{stage}-{i}.json"
                        own = ["--json", str(path), "--child", f"{i}/{count}", f"{until:.3f}"]
                        running.append(_started([*words, *own], path))
                    earlier += _followed(report, part, running, until, earlier)
                report.save()
        finally:
            _end(running, folder)


def _share(seconds: float, parts: Sequence[str]) -> float:
    """Of the time that these parts have, that of the first."""
    return seconds * PARTS[parts[0]].minutes / sum(PARTS[part].minutes for part in parts)


def _started(words: Sequence[str], path: Path) -> Child:
    """A process that writes to `path`, ends with this one, and is not reached by an interrupt of the terminal."""
    errors = path.with_suffix(".txt")
    with open(errors, "wb") as file:
        streams = {"stdin": subprocess.PIPE, "stdout": sys.stdout.fileno(), "stderr": file}
        return Child(subprocess.Popen(words, process_group=0, **streams), path, errors)


def _followed(
    report: Report, part: str, running: list[Child], until: float, earlier: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Take over what the processes write until all have ended, or are killed; returns what each has written of `part`.

    `earlier` is what was written in the stages before.
    """
    seen = None
    while any(child.run.poll() is None for child in running) and time.monotonic() < until + GRACE:
        time.sleep(EVERY)
        written = [child.path.stat().st_mtime_ns if child.path.exists() else 0 for child in running]
        if written != seen:
            seen = written
            report.content["parts"][part] = _merged(earlier + [child.part(part) for child in running])
            report.save()
    found = []
    for child in running:
        late = child.run.poll() is None
        child.run.kill()
        report.failed |= child.run.wait() != 0
        child.run.stdin.close()
        found.append(child.part(part))
        if problem := child.problem(late):
            found[-1]["problem"] = problem
            print(f"{part}: {problem}", flush=True)
    running.clear()
    report.content["parts"][part] = _merged(earlier + found)
    return found


def _merged(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A part of which several processes wrote."""
    whole: dict[str, Any] = {"rows": [], "left_out": [], "seconds": 0.0, "problems": []}
    for one in found:
        rest = dict(one)
        for name in ("rows", "left_out"):
            whole[name] += rest.pop(name, [])
        whole["seconds"] = max(whole["seconds"], rest.pop("seconds", 0.0))
        whole["problems"] += [rest.pop("problem")] if "problem" in rest else []
        whole |= rest
    return whole


def _end(running: Sequence[Child], folder: Path) -> None:
    """Kill what runs and remove what it wrote. This may come between any two lines, in those of `Popen` too."""
    for child in running:
        child.run.kill()
        with suppress(ChildProcessError):
            # `wait` takes a lock, which the line that this came after may hold.
            os.waitid(os.P_PID, child.run.pid, os.WEXITED | os.WNOWAIT)
    shutil.rmtree(folder, ignore_errors=True)


def end_with_the_parent() -> None:
    """End this process as soon as the one that started it is gone, however that ended."""

    def wait() -> None:
        # Nothing is ever written to it.
        os.read(STDIN, 1)
        os._exit(process.INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()
