"""Part `ops`: every operation on both backends against eager PyTorch, SDPA and flex attention."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from dkv.bench import machine
from dkv.bench.gpu import packed
from dkv.bench.gpu.cases import Case, Sizes
from dkv.bench.gpu.lab import TITLES, Lab
from dkv.bench.gpu.linear import linear4, linear8
from dkv.bench.gpu.operations import OPERATIONS, attention, choose, choose_fused
from dkv.bench.gpu.report import Report, in_full, must_answer
from dkv.bench.report import fixed
from dkv.bench.timing import milliseconds, synchronise
from dkv.models import ModelSpec

WAYS = ("triton", "torch", "eager", "sdpa", "flex", "fused", "strips", "int8pack")
# Flex attention compiles for every shape: seconds each, which must not eat the time of the others.
FLEX_SECONDS = 15.0
# About how long each way is timed.
SECONDS = 0.15

ACTIVE = 32
BATCHES = (1, 8)
# Of hidden states, around the border between the ways "fused" and "strips" of the choice from them.
ROWS = (64, 128, 256, 512)


def items(
    specs: dict[str, ModelSpec],
    slots: Sequence[int],
    batches: Sequence[int],
    some: int,
    dtype: torch.dtype,
    rows: Sequence[int] = (),
) -> Iterator[tuple[str, Callable[[torch.device], Case]]]:
    """Every (name, function that makes the case on a device) of a full and a cached step, the smaller batches first.

    Args:
        some: slots that a cached step computes.
        rows: of hidden states, for which the choice from them is made too, before all others.
    """
    for r, (family, spec) in product(rows, specs.items()):
        yield f"choose_fused {r} rows {TITLES[family]}", partial(choose_fused, Sizes(spec, 1, r, r, dtype))
    for b, s, (family, spec) in product(batches, slots, specs.items()):
        for kind, active in (("full", s), ("cached", some)):
            makes = {make.__name__: make for make in OPERATIONS.values()}
            if b > 1:
                makes["attention ragged"] = partial(attention, ragged=True)
                makes |= {"attention packed": packed.attention, "rope_scatter packed": packed.rope_scatter}
            if kind == "cached":
                makes |= {"attention gap": partial(attention, gap=True), "choose drawn": partial(choose, drawn=True)}
                makes["choose_fused entropy"] = partial(choose_fused, entropy=True)
                makes["choose_fused int8"] = partial(choose_fused, eight=True)
                makes |= {f"{make.__name__} down": partial(make, down=True) for make in (linear8, linear4)}
            for name, make in makes.items():
                yield f"{name} {kind} {TITLES[family]} B{b} S{s}", partial(make, Sizes(spec, b, s, active, dtype))


def shares(case: Case, seconds: float, rates: dict[str, float]) -> dict[str, float]:
    """How much of a device's `dkv.bench.machine.rates` a time reaches; the floor takes 1 of the larger."""
    copy, matrix = case.bytes / rates["copy_bytes_per_s"], case.flops / rates["matrix_flops_per_s"]
    return {"copy_share": copy / seconds, "matrix_share": matrix / seconds}


def _started(case: Case, ways: Iterable[str], device: torch.device) -> tuple[dict, dict[str, dict[str, str]]]:
    """Calls by the ways that run, each called twice (compilation, scratch), and the errors of the others."""
    ready, errors = {}, {}
    for way in ways:
        call = partial(case.run_by, way)
        try:
            for _ in range(2):
                call()
            synchronise(device)
            ready[way] = call
        except Exception as error:
            errors[way] = in_full(error)
            must_answer(device, way)
    return ready, errors


def values_of(label: str, case: Case, times: dict, errors: dict[str, str], rates: dict[str, float]) -> dict[str, Any]:
    """A result as it is written: times, shares of what the device reaches, and the ratio to the best other."""
    values = {"name": label, "bytes": case.bytes, "flops": case.flops, "errors": errors, "ms": times}
    subject = next((name for name in ("triton", "torch") if name in times), None)
    if subject is None:
        return values
    others = {name: ms["median"] for name, ms in times.items() if name != subject}
    values |= {"subject": subject, **shares(case, times[subject]["median"] / 1e3, rates)}
    if others:
        best = min(others, key=others.get)
        values |= {"best_other": best, "ratio_to_best_other": others[best] / times[subject]["median"]}
    return values


def _time(way: str, values: dict[str, Any]) -> str:
    if way in values["errors"]:
        return "error"
    if (ms := values["ms"].get(way)) is None:
        return "-"
    return f"{ms['median']:8.3f} \u00b1{(ms['high'] - ms['low']) / 2:7.3f}"


def _host(values: dict[str, Any]) -> str:
    """Microseconds that sending the call takes, of the subject; known of a GPU alone."""
    ms = values["ms"].get(values.get("subject"), {}).get("host")
    return "" if ms is None else f"{ms * 1e3:.1f}"


COLUMNS = {
    "operation": (44, "{name}"),
    **{way: (17, partial(_time, way)) for way in WAYS},
    "host us": (8, _host),
    "MB": (9, lambda values: f"{values['bytes'] / 1e6:.4g}"),
    "GFLOP": (9, lambda values: f"{values['flops'] / 1e9:.4g}"),
    "copy": (6, "{copy_share:.0%}"),
    "matrix": (7, "{matrix_share:.0%}"),
    "ratio": (7, "{ratio_to_best_other:.2f}x"),
    "": (6, "{best_other}"),
}


def told(rates: dict[str, float], subject: str, dtype: str = "bfloat16") -> str:
    """What the shares and ratios of a table are of."""
    return (
        f"copy {rates['copy_bytes_per_s'] / 1e12:.3g} TB/s, {dtype} matrix product "
        f"{rates['matrix_flops_per_s'] / 1e12:.3g} TFLOP/s, both measured now; the shares, and the ratio to the best "
        f"other (above 1: faster than it), are those of {subject}"
    )


def run(report: Report, lab: Lab) -> None:
    """Time every wanted operation until the time is over."""
    report.begin("ops", "milliseconds per call, median and half the range from tenth to ninetieth percentile")
    rates = machine.rates(lab.device, torch.bfloat16)
    report.part |= rates
    print(told(rates, lab.backends[0]), fixed(COLUMNS), sep="\n")
    compiling = 0.0
    batches, some, rows = (BATCHES, ACTIVE, ROWS) if lab.gpu else ((1, 2), 8, ())
    for label, make in report.items(items(lab.specs, lab.slots, batches, some, lab.dtype, rows)):
        case = report.attempt(label, lab.device, partial(make, lab.device))
        if case is None:
            continue
        ready, errors = _started(case, [*lab.backends, *(way for way in case.others if way != "flex")], lab.device)
        if "flex" in case.others and compiling < FLEX_SECONDS and lab.gpu:
            before = report.spent
            more, problems = _started(case, ["flex"], lab.device)
            compiling, ready, errors = compiling + report.spent - before, ready | more, errors | problems
        times = milliseconds(ready, lab.device, SECONDS) if ready else {}
        shown = {way: error["error"] for way, error in errors.items()}
        values = values_of(label, case, times, shown, rates)
        values["tracebacks"] = {way: error["traceback"] for way, error in errors.items()}
        line = fixed(COLUMNS, values) + "".join(f"\n    {way}: {error}" for way, error in shown.items())
        failed = any("OutOfMemory" not in shown[way] for way in lab.backends if way in shown)
        report.row(line, values, failed)
        del case, ready
        if lab.gpu:
            torch.cuda.empty_cache()
    report.end()
