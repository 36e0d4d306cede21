"""Part `checks`: the checks of a GPU, without pytest."""

import time
from collections import Counter
from typing import Any

import torch

# Importing them fills the list.
from dkv.bench.gpu import checks_device, checks_ops, checks_whole  # noqa: F401
from dkv.bench.gpu.lab import Lab
from dkv.bench.gpu.report import Report, in_full, must_answer, short
from dkv.bench.gpu.tools import CHECKS, Skipped
from dkv.kernels import use_backend

# What a name begins with, the most telling first: everything together, and what only a GPU can do. Then single
# operations.
FIRST = ("generation", "replayed_steps", "cuda_graph", "a_row_alone", "repeated", "torch_compile", "offsets", "second")


@torch.no_grad()
def run_check(name: str, device: torch.device, backend: str) -> None:
    """Make one check, with seeded inputs; of a GPU with all cases.

    Raises:
        AssertionError: it failed.
        Skipped: this machine cannot make it.
    """
    torch.manual_seed(0)
    with use_backend(backend):
        CHECKS[name](device, device.type != "cuda")


def ordered() -> list[str]:
    """The names of all checks, the most telling first."""
    return sorted(CHECKS, key=lambda name: next((i for i, x in enumerate(FIRST) if name.startswith(x)), len(FIRST)))


def run(report: Report, lab: Lab) -> None:
    """Make every wanted check until the time is over."""
    backend = lab.backends[0]
    report.begin("checks", f"every operation on backend {backend} against float64, and what only a device shows")
    counts: Counter[str] = Counter()
    for name, _ in report.items((name, None) for name in ordered()):
        start, values = time.monotonic(), {"name": name, "verdict": "PASS", "found": ""}
        try:
            run_check(name, lab.device, backend)
        except (Skipped, torch.OutOfMemoryError) as reason:
            values |= {"verdict": "SKIP", "found": str(reason) if isinstance(reason, Skipped) else short(reason)}
        except Exception as error:
            values |= {"verdict": "FAIL", "found": short(error), **in_full(error)}
        counts[values["verdict"]] += 1
        values["seconds"] = round(time.monotonic() - start, 2)
        _tell(report, values)
        must_answer(lab.device, name)
    report.end()
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped", flush=True)


def _tell(report: Report, values: dict[str, Any]) -> None:
    line = f"{values['verdict']} {values['name']:44} {values['seconds']:6.1f} s  {values['found']}"
    report.row(line, values, failed=values["verdict"] == "FAIL")
