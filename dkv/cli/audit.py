"""`dkv audit`: compile every kernel for every GPU architecture, and hold the result against a budget."""

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dkv.common import process

SUMMARY = "Compile every kernel and launch-table row for every GPU architecture, without a GPU, and check the result."

EXAMPLES = """\
examples:
  dkv audit                                   everything: several minutes
  dkv audit --quick                           one case of every operation and architecture: under a minute
  dkv audit --arch sm_90 gfx942 --op commit   a part of it
  dkv audit --json > audit.json               the same for a program

A row breaks its budget with a stack, with spilled registers, with more shared memory than the
architecture (or, for a default row, any) has, or without an instruction that it is made for. The
exit code is 0 if none does, 1 if one does or does not compile, 2 for wrong arguments.

registers, stack and spills are per thread, of the last two bytes. shared is what a program takes of
what it may. occupancy is the share of the warps of a multiprocessor that registers, shared memory
and program size leave room for; on AMD read wave for warp, and compute unit for multiprocessor. On
sm_100 the tensor cores are driven by tcgen05, on gfx942 by v_mfma, elsewhere by wgmma or mma.sync.
"""

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
WORKER = "dkv.kernels.dev.audit"
# Fixed when the kernels are imported, in any process: those that compile start without it.
INTERPRET = "TRITON_INTERPRET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS, metavar="NAME",
                        help=f"architectures: {', '.join(ARCHS[:-1])} or {ARCHS[-1]} (default: all)")  # fmt: skip
    parser.add_argument("--op", nargs="+", metavar="NAME",
                        help="operations, such as attention or commit, or the import path of a "
                        "module of yours that has audit_cases(arch) (default: all)")  # fmt: skip
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
    began, rows = time.monotonic(), []
    with at_work(jobs) as workers:
        # A worker that has just told the cases goes on to compile.
        cases = find_cases(workers[0], args.op, list(dict.fromkeys(args.arch)), args.quick)
        with contextlib.closing(compiled(cases, workers)) as found, Bar(len(cases), "kernel") as bar:
            for row in found:
                rows.append(row)
                bar.update()
    rows = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    bad, failed = sum(bool(r.get("broken")) for r in rows), sum("error" in r for r in rows)
    seconds = round(time.monotonic() - began, 1)
    if args.json:
        print(json.dumps({"versions": versions(), "rows": rows, "broken": bad, "failed": failed, "seconds": seconds}))
    else:
        print(table(rows))
        found = f"{counted(len(rows), 'row')}: {bad} over budget, {failed} that do not compile"
        print(f"\n{found}; triton {versions()['triton']}, {counted(jobs, 'process')}, {seconds:.0f} s")
    return 1 if bad or failed else 0


@contextlib.contextmanager
def at_work(number: int) -> Iterator[list["Worker"]]:
    """Workers, which are gone at the end, and so is everything that they wrote, however it comes."""
    folder = tempfile.mkdtemp(prefix="dkv-audit-")
    workers = [Worker(Path(folder, str(i))) for i in range(number)]

    def end() -> None:
        for worker in workers:
            worker.stop()
        shutil.rmtree(folder, ignore_errors=True)

    with process.undoing(end):
        try:
            yield workers
        finally:
            end()
            for worker in workers:
                worker.close()


class Worker:
    """A process that answers questions in order; it is started by the first one, and again if it died.

    Args:
        folder: for Triton's cache, which starts empty so that nothing old passes, and what is printed.
    """

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None
        self.ended, self.lock = False, threading.RLock()

    def ask(self, question: dict[str, Any]) -> Any:
        """The answer; {"error": ...} if the process dies of the question, as a compiler may."""
        with self.lock:
            if self.ended:
                return {"error": "the audit has ended"}
            if self.process is None or self.process.poll() is not None:
                self.start()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.process.communicate()
        code = self.process.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = (self.folder / "printed").read_text("utf-8", "replace").strip().splitlines()
        return {"error": f"the process {how}{': ' if said else ''}{said[-1] if said else ''}"}

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != INTERPRET}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment["TRITON_CACHE_DIR"] = str(self.folder / "cache")
        # Compilers leave their files behind when they are killed.
        environment["TMPDIR"] = str(self.folder)
        with open(self.folder / "printed", "w") as printed:
            # In a group of its own: the terminal's interrupt does not reach it, and its compilers end with it.
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER], env=environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=printed, start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """End the process, and start none any more."""
        with self.lock:
            self.ended = True
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Close the pipes of a process that has ended."""
        if self.process is not None:
            self.process.communicate()


def find_cases(worker: Worker, ops: list[str] | None, archs: list[str], quick: bool) -> list[dict[str, Any]]:
    """What there is to compile.

    Raises:
        ValueError: unknown operations, faulty cases, or none.
    """
    cases = worker.ask({"ops": ops, "archs": archs})
    if "error" in cases:
        raise ValueError(cases["error"])
    if quick:
        # The one that asks most of the compiler stands for the others.
        chosen: dict[tuple[str, str], dict[str, Any]] = {}
        for case in cases:
            best = chosen.setdefault((case["op"], case["arch"]), case)
            if case["weight"] > best["weight"]:
                chosen[case["op"], case["arch"]] = case
        cases = list(chosen.values())
    if not cases:
        raise ValueError("there is nothing to compile")
    return cases


def compiled(cases: list[dict[str, Any]], workers: list[Worker]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The place of every case in the list and what became of it, as they are done."""
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(place: int, case: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        worker = free.get()
        try:
            answer = worker.ask({name: case[name] for name in ("op", "arch", "name")})
        finally:
            free.put(worker)
        return place, {"op": case["op"], "case": case["name"], "arch": case["arch"]} | answer

    pool = ThreadPoolExecutor(len(workers))
    try:
        for done in as_completed([pool.submit(one, *numbered) for numbered in enumerate(cases)]):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


HEADER = ("case", "arch", "warps", "stages", "registers", "stack", "spills", "shared KB", "instructions", "occupancy")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in columns, the verdict last."""
    lines = [(*HEADER, "verdict")] + [columns(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {HEADER.index(name) for name in ("case", "arch", "instructions")} | {len(HEADER)}
    return "\n".join(
        "  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in lines
    )


def columns(row: dict[str, Any]) -> tuple[str, ...]:
    start = [row["case"], row["arch"], str(row.get("warps", "")), str(row.get("stages", ""))]
    if "error" in row:
        return *start, *[""] * (len(HEADER) - len(start)), f"FAILED {row['error']}"
    shared = f"{row['shared'] / 1024:.1f} / {row['limit'] // 1024}"
    verdict = f"BROKEN {', '.join(row['broken'])}" if row["broken"] else "ok"
    return (
        *start, *(str(row[name]) for name in ("registers", "stack", "spills")), shared,
        " ".join(row["instructions"]) or "-", f"{row['occupancy']:.0%}", verdict,
    )  # fmt: skip
