"""Part `ops`: every operation on both backends against eager PyTorch, SDPA and flex attention."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from dkv.bench import machine
from dkv.bench.gpu.cases import Case, Sizes, running
from dkv.bench.gpu.operations import OPERATIONS, attention, choose
from dkv.bench.gpu.report import Clock, Report, must_answer, short
from dkv.bench.gpu.timing import Timer
from dkv.bench.report import aligned, shown
from dkv.bench.timing import synchronise
from dkv.models import ModelSpec

COLUMNS = ("triton", "torch", "eager", "sdpa", "flex")
# Flex attention compiles for every shape: seconds each, which must not eat the time of the others.
FLEX_SHARE = 0.3


SHAPE_OF = {"llada": "llada-8b", "dream": "dream-7b"}
TITLES = {"llada": "LLaDA-8B", "dream": "Dream-7B"}
ACTIVE = 32
SLOTS = (512, 1024, 2048)
BATCHES = (1, 8)


def items(specs: dict[str, ModelSpec], tiny: bool) -> Iterator[tuple[str, Callable[[torch.device], Case]]]:
    """Every (name, function that makes the case on a device) of a full and a cached step, the smaller sizes first."""
    slots, batches, some = ((48,), (1, 2), 8) if tiny else (SLOTS, BATCHES, ACTIVE)
    for s, b, (family, spec) in product(slots, batches, specs.items()):
        for kind, active in (("full", s), ("cached", some)):
            z = Sizes(spec, b, s, active, torch.float32 if tiny else torch.bfloat16)
            makes = {make.__name__: make for make in OPERATIONS.values()}
            if b > 1:
                makes["attention ragged"] = partial(attention, ragged=True)
            if kind == "cached":
                makes["choose drawn"] = partial(choose, drawn=True)
            for name, make in makes.items():
                yield f"{name} {kind} {TITLES[family]} B{b} S{s}", partial(make, z)


def _on(way: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with running(way):
            return call()

    return run


def _started(contenders: dict[str, Callable[[], object]], device: torch.device) -> tuple[dict, dict[str, str]]:
    """The contenders that run, each called twice (compilation, scratch), and the errors of the others."""
    ready, errors = {}, {}
    for name, call in contenders.items():
        try:
            for _ in range(2):
                call()
            synchronise(device)
            ready[name] = call
        except Exception as error:
            errors[name] = short(error)
            must_answer(device, name)
    return ready, errors


def _values(label: str, case: Case, times: dict, errors: dict[str, str], rates: dict[str, float]) -> dict[str, Any]:
    """A result as it is written: times, shares of what the device reaches, and the ratio to the best other."""
    values: dict[str, Any] = {"name": label, "bytes": case.bytes, "flops": case.flops, "errors": errors}
    values["ms"] = {name: {"median": t.median, "low": t.low, "high": t.high} for name, t in times.items()}
    subject = next((name for name in ("triton", "torch") if name in times), None)
    if subject is None:
        return values
    seconds = times[subject].median / 1e3
    others = {name: t.median for name, t in times.items() if name != subject}
    values |= {"subject": subject, "copy_share": case.bytes / seconds / rates["copy_bytes_per_s"]}
    values["matrix_share"] = case.flops / seconds / rates["matrix_flops_per_s"]
    if others:
        best = min(others, key=others.get)
        values |= {"best_other": best, "ratio_to_best_other": others[best] / times[subject].median}
    return values


# What is printed as it comes, in columns of fixed widths.
HEADER = ("operation", *COLUMNS, "MB", "GFLOP", "copy", "matrix", "ratio", "")
WIDTHS = (44, *[17] * len(COLUMNS), 9, 9, 6, 7, 7, 6)


def _line(values: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        if name in values["errors"]:
            return "error"
        if name not in values["ms"]:
            return "-"
        t = values["ms"][name]
        return f"{t['median']:8.3f} \u00b1{(t['high'] - t['low']) / 2:7.3f}"

    shares = [shown(values.get(name), "{:.0%}") for name in ("copy_share", "matrix_share")]
    best = [shown(values.get("ratio_to_best_other"), "{:.2f}x"), values.get("best_other", "")]
    work = [f"{values['bytes'] / 1e6:.1f}", f"{values['flops'] / 1e9:.1f}"]
    line = aligned([values["name"], *map(cell, COLUMNS), *work, *shares, *best], WIDTHS)
    return line + "".join(f"\n    {name}: {error}" for name, error in values["errors"].items())


def run(
    report: Report,
    clock: Clock,
    device: torch.device,
    backends: list[str],
    specs: dict[str, ModelSpec],
    tiny: bool,
    only: str,
) -> None:
    """Time every operation whose name contains `only` until the clock is over."""
    timer = Timer(device, seconds=0.3)
    rates = machine.rates(device, torch.bfloat16)
    report.begin("ops", "milliseconds per call, median and half the range from tenth to ninetieth percentile", **rates)
    print(
        f"copy {rates['copy_bytes_per_s'] / 1e12:.3f} TB/s, bfloat16 matrix product "
        f"{rates['matrix_flops_per_s'] / 1e12:.1f} TFLOP/s, both measured now; the shares, and the ratio to the best "
        f"other (above 1: faster than it), are those of {backends[0]}"
    )
    print(aligned(HEADER, WIDTHS))
    left_out, compiling = [], 0.0
    for label, make in items(specs, tiny):
        if only.lower() not in label.lower():
            continue
        if clock.over:
            left_out.append(label)
            continue
        try:
            case = make(device)
        except torch.OutOfMemoryError as error:
            report.row(f"{label:44} out of memory", {"name": label, "errors": {"inputs": short(error)}})
            continue
        ways = [*backends, *(way for way in case.others if way != "flex")]
        ready, errors = _started({way: _on(way, case.call(way)) for way in ways}, device)
        if "flex" in case.others and compiling < FLEX_SHARE * clock.limit and device.type == "cuda":
            before = clock.spent
            more, problems = _started({"flex": _on("flex", case.call("flex"))}, device)
            compiling, ready, errors = compiling + clock.spent - before, ready | more, errors | problems
        times = timer.compare(ready) if ready else {}
        values = _values(label, case, times, errors, rates)
        ours = [errors[name] for name in backends if name in errors]
        report.row(_line(values), values, failed=any("OutOfMemory" not in error for error in ours))
        del case, ready
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.end(clock, left_out)
