"""`dkv audit`: compile every kernel for every GPU architecture, and hold the result against a budget."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dkv.common import process

SUMMARY = "Compile every kernel and launch-table entry for every GPU architecture, without a GPU, and check the result."

EXAMPLES = """\
examples:
  dkv audit                                   everything: several minutes
  dkv audit --quick                           one case of every operation and architecture: under a minute
  dkv audit --arch sm_90 gfx942 --op commit   a part of it
  dkv audit --json > audit.json               the same for a program

A kernel breaks its budget with a stack, with spilled registers, with more shared memory than the
architecture (or, for a default entry, any) has, or without an instruction that it is made for. The
exit code is 0 if none does, 1 if one does or does not compile, 2 for wrong arguments.

registers, stack and spills are per thread, of the last two bytes. shared is what a program takes of
what it may. occupancy is the share of the warps of a multiprocessor that registers, shared memory
and program size leave room for; on AMD read wave for warp, and compute unit for multiprocessor. On
sm_100 the tensor cores are driven by tcgen05, on gfx942 by v_mfma, elsewhere by wgmma or mma.sync.
"""

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
WORKER = "dkv.kernels.dev.audit"
# Fixed when the kernels are imported, in any process: those that compile start without it.
INTERPRET = "TRITON_INTERPRET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    archs = f"architectures: {', '.join(ARCHS[:-1])} or {ARCHS[-1]} (default: all)"
    ops = "operations, such as attention or commit, or import paths of modules of yours that have audit_cases(arch)"
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS, metavar="NAME", help=archs)
    parser.add_argument("--op", nargs="+", metavar="NAME", help=f"{ops} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one case of every operation and architecture")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile (default: one per core)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    from dkv.common.bar import Bar, counted
    from dkv.kernels.common.backend import has_triton
    from dkv.version import versions

    jobs = len(os.sched_getaffinity(0)) if args.jobs is None else args.jobs
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    if not has_triton():
        raise ValueError("the package triton, which compiles the kernels, is not installed")
    began, lines = time.monotonic(), []
    archs = list(dict.fromkeys(args.arch))
    question = {"ops": args.op, "archs": archs, "quick": args.quick, "jobs": jobs}
    with answers(question) as told, Bar(next(told)["cases"], "kernel") as bar:
        for line in told:
            lines.append(line)
            bar.update()
    lines.sort(key=lambda line: line.pop("place"))
    bad, failed = sum(bool(line.get("broken")) for line in lines), sum("error" in line for line in lines)
    seconds = round(time.monotonic() - began, 1)
    if args.json:
        print(json.dumps({"versions": versions(), "rows": lines, "broken": bad, "failed": failed, "seconds": seconds}))
    else:
        verdict = f"{counted(len(lines), 'kernel')}: {bad} over budget, {failed} that do not compile"
        print(
            f"{table(lines)}\n\n{verdict}; triton {versions()['triton']}, {counted(jobs, 'process')}, {seconds:.0f} s"
        )
    return 1 if bad or failed else 0


@contextlib.contextmanager
def answers(question: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """What a process that compiles tells. It is gone at the end, and so is all that it wrote, however the end comes."""
    folder = Path(tempfile.mkdtemp(prefix="dkv-audit-"))
    environment = {name: value for name, value in os.environ.items() if name != INTERPRET}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # Triton's cache starts empty, so that nothing old passes. Compilers leave their files behind when they are killed.
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder)}
    started: list[subprocess.Popen] = []

    def end() -> None:
        for worker in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            _wait_for_group(worker.pid)
        shutil.rmtree(folder, ignore_errors=True)

    with process.undoing(end), open(folder / "printed", "w+") as printed:
        try:
            command, pipes = [sys.executable, "-m", WORKER], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            # In a group of its own: the terminal's interrupt does not reach it, and its compilers end with it.
            worker = subprocess.Popen(
                command, env=environment, text=True, **pipes, stderr=printed, start_new_session=True
            )
            started.append(worker)
            with worker:
                json.dump(question | {"folder": str(folder)}, worker.stdin)
                worker.stdin.close()
                yield _lines(worker, folder / "printed")
        finally:
            end()


def _wait_for_group(group: int, seconds: float = 5) -> None:
    """Until the last process of a group that was killed is gone, or so many seconds: it may be writing a file yet."""
    until = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.01)


def _lines(worker: subprocess.Popen, printed: Path) -> Iterator[dict[str, Any]]:
    """The lines that a process writes.

    Raises:
        ValueError: it cannot do what it is asked, or it fails.
    """
    for line in map(json.loads, worker.stdout):
        if "error" in line and "place" not in line:
            raise ValueError(line["error"])
        yield line
    if worker.wait():
        said = printed.read_text("utf-8", "replace").strip().splitlines()
        raise ValueError(f"the process that compiles failed: {said[-1] if said else worker.returncode}")


HEADER = ("case", "arch", "warps", "stages", "registers", "stack", "spills", "shared KB", "instructions", "occupancy")


def table(lines: list[dict[str, Any]]) -> str:
    """The lines in columns, the verdict last."""
    cells = [(*HEADER, "verdict")] + [columns(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if name in ("case", "arch", "instructions", "verdict") else ">" for name in cells[0]]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in cells
    )


def columns(line: dict[str, Any]) -> tuple[str, ...]:
    cells = {name: str(x) for name, x in line.items() if name in HEADER}
    if "error" in line:
        verdict = f"FAILED {line['error']}"
    else:
        verdict = f"BROKEN {', '.join(line['broken'])}" if line["broken"] else "ok"
        cells["shared KB"] = f"{line['shared'] / 1024:.1f} / {line['limit'] // 1024}"
        cells |= {"instructions": " ".join(line["instructions"]) or "-", "occupancy": f"{line['occupancy']:.0%}"}
    return *(cells.get(name, "") for name in HEADER), verdict
