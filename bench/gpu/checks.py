"""Part `checks`: the checks of a GPU, without pytest."""

import time

import torch

# Importing them fills the list.
from dkv.bench.gpu import checks_device, checks_ops, checks_whole  # noqa: F401
from dkv.bench.gpu.report import Clock, Report, must_answer, short
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


def run(report: Report, clock: Clock, device: torch.device, backend: str, only: str) -> None:
    """Make every check whose name contains `only` until the clock is over."""
    report.begin("checks", f"every operation on backend {backend} against float64, and what only a device shows")
    left_out, counts = [], {"PASS": 0, "FAIL": 0, "SKIP": 0}
    for name in CHECKS:
        if only.lower() not in name.lower():
            continue
        if clock.over:
            left_out.append(name)
            continue
        start, verdict, found = time.monotonic(), "PASS", ""
        try:
            run_check(name, device, backend)
        except Skipped as reason:
            verdict, found = "SKIP", str(reason)
        except torch.OutOfMemoryError as error:
            verdict, found = "SKIP", short(error)
        except Exception as error:
            verdict, found = "FAIL", short(error)
        counts[verdict] += 1
        values = {"name": name, "verdict": verdict, "found": found, "seconds": round(time.monotonic() - start, 2)}
        report.row(f"{verdict} {name:44} {values['seconds']:6.1f} s  {found}", values, failed=verdict == "FAIL")
        must_answer(device, name)
    report.end(clock, left_out)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
