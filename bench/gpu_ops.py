"""Part `ops`: every operation on both backends against eager PyTorch, SDPA and flex attention."""

from collections.abc import Callable
from typing import Any

import torch

from dkv import kernels
from dkv.bench.gpu_report import Clock, Report, must_answer, short
from dkv.bench.gpu_timing import Timer
from dkv.bench.gpu_work import Work, items
from dkv.models import ModelSpec

COLUMNS = ("triton", "torch", "eager", "sdpa", "flex")
# Flex attention compiles for every shape: seconds each, which must not eat the time of the others.
FLEX_SHARE = 0.3


def _on(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with kernels.use_backend(name):
            return call()

    return run


def _started(contenders: dict[str, Callable[[], object]], device: torch.device) -> tuple[dict, dict[str, str]]:
    """The contenders that run, each called twice (compilation, scratch), and the errors of the others."""
    ready, errors = {}, {}
    for name, call in contenders.items():
        try:
            for _ in range(2):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ready[name] = call
        except Exception as error:
            errors[name] = short(error)
            must_answer(device, name)
    return ready, errors


def _values(label: str, work: Work, times: dict, errors: dict[str, str], rates: dict[str, float]) -> dict[str, Any]:
    """One row as it is written: times, shares of what the device reaches, and the ratio to the best other."""
    values: dict[str, Any] = {
        "name": label, "bytes": work.bytes, "flops": work.flops, "errors": errors,
        "ms": {name: {"median": t.median, "low": t.low, "high": t.high} for name, t in times.items()},
    }  # fmt: skip
    subject = next((name for name in ("triton", "torch") if name in times), None)
    if subject is None:
        return values
    seconds = times[subject].median / 1e3
    others = {name: t.median for name, t in times.items() if name != subject}
    values |= {
        "subject": subject, "copy_share": work.bytes / seconds / rates["copy_bytes_per_s"],
        "matrix_share": work.flops / seconds / rates["matrix_flops_per_s"],
    }  # fmt: skip
    if others:
        best = min(others, key=others.get)
        values |= {"best_other": best, "ratio_to_best_other": others[best] / times[subject].median}
    return values


def _line(values: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        if name in values["errors"]:
            return f"{'error':>17}"
        if name not in values["ms"]:
            return f"{'-':>17}"
        t = values["ms"][name]
        return f"{t['median']:8.3f} \u00b1{(t['high'] - t['low']) / 2:7.3f}"

    line = f"{values['name']:44}" + " ".join(cell(name) for name in COLUMNS)
    line += f" {values['bytes'] / 1e6:9.1f} {values['flops'] / 1e9:9.1f}"
    if "subject" in values:
        line += f" {values['copy_share']:6.0%} {values['matrix_share']:7.0%}"
    if "best_other" in values:
        line += f" {values['ratio_to_best_other']:6.2f}x {values['best_other']}"
    return line + "".join(f"\n    {name}: {error}" for name, error in values["errors"].items())


def run(
    report: Report, clock: Clock, device: torch.device, backends: list[str], specs: dict[str, ModelSpec], tiny: bool,
    only: str,
) -> None:  # fmt: skip
    """Time every operation whose name contains `only` until the clock is over."""
    timer = Timer(device, seconds=0.3)
    rates = timer.rates()
    report.begin("ops", "milliseconds per call, median and half the range from tenth to ninetieth percentile", **rates)
    print(
        f"copy {rates['copy_bytes_per_s'] / 1e12:.3f} TB/s, bfloat16 matrix product "
        f"{rates['matrix_flops_per_s'] / 1e12:.1f} TFLOP/s, both measured now; the shares, and the ratio to the best "
        f"other (above 1: faster than it), are those of {backends[0]}"
    )
    heads = " ".join(f"{name:>17}" for name in COLUMNS)
    print(f"{'operation':44}{heads} {'MB':>9} {'GFLOP':>9} {'copy':>6} {'matrix':>7} {'ratio':>7}")
    left_out, compiling = [], 0.0
    for label, make in items(specs, tiny):
        if only.lower() not in label.lower():
            continue
        if clock.over:
            left_out.append(label)
            continue
        try:
            work = make(device)
        except torch.OutOfMemoryError as error:
            report.row(f"{label:44} out of memory", {"name": label, "errors": {"inputs": short(error)}})
            continue
        others = dict(work.others)
        flex = others.pop("flex", None)
        ready, errors = _started({name: _on(name, work.ours) for name in backends} | others, device)
        if flex is not None and compiling < FLEX_SHARE * clock.limit and device.type == "cuda":
            before = clock.spent
            more, problems = _started({"flex": flex}, device)
            compiling, ready, errors = compiling + clock.spent - before, ready | more, errors | problems
        times = timer.compare(ready) if ready else {}
        values = _values(label, work, times, errors, rates)
        ours = [errors[name] for name in backends if name in errors]
        report.row(_line(values), values, failed=any("OutOfMemory" not in error for error in ours))
        del work, others, flex, ready
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.end(clock, left_out)
