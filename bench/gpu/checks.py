"""Part `checks`: the checks of a GPU, without pytest."""

import time
from collections import Counter

import torch

# Importing them fills the list.
from dkv.bench.gpu import checks_device, checks_ops, checks_whole  # noqa: F401
from dkv.bench.gpu.report import Report, must_answer, short
from dkv.bench.gpu.tools import CHECKS, Skipped
from dkv.kernels import use_backend


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


def run(report: Report, device: torch.device, backend: str) -> None:
    """Make every wanted check until the time is over."""
    report.begin("checks", f"every operation on backend {backend} against float64, and what only a device shows")
    counts: Counter[str] = Counter()
    for name, _ in report.items(CHECKS.items()):
        start, verdict, found = time.monotonic(), "PASS", ""
        try:
            run_check(name, device, backend)
        except (Skipped, torch.OutOfMemoryError) as reason:
            verdict, found = "SKIP", str(reason) if isinstance(reason, Skipped) else short(reason)
        except Exception as error:
            verdict, found = "FAIL", short(error)
        counts[verdict] += 1
        values = {"name": name, "verdict": verdict, "found": found, "seconds": round(time.monotonic() - start, 2)}
        report.row(f"{verdict} {name:44} {values['seconds']:6.1f} s  {found}", values, failed=verdict == "FAIL")
        must_answer(device, name)
    report.end()
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
