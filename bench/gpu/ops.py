"""Part `ops`: every operation on both backends against eager PyTorch, SDPA and flex attention."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from dkv.bench import machine
from dkv.bench.gpu.cases import Case, Sizes
from dkv.bench.gpu.operations import OPERATIONS, attention, choose
from dkv.bench.gpu.report import Report, must_answer, short
from dkv.bench.report import fixed
from dkv.bench.timing import milliseconds, synchronise
from dkv.models import ModelSpec

WAYS = ("triton", "torch", "eager", "sdpa", "flex")
# Flex attention compiles for every shape: seconds each, which must not eat the time of the others.
FLEX_SHARE = 0.3

SHAPE_OF = {"llada": "llada-8b", "dream": "dream-7b"}
TITLES = {"llada": "LLaDA-8B", "dream": "Dream-7B"}
ACTIVE = 32
SLOTS = (512, 1024, 2048)
BATCHES = (1, 8)


def items(
    specs: dict[str, ModelSpec], slots: Sequence[int], batches: Sequence[int], some: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[torch.device], Case]]]:
    """Every (name, function that makes the case on a device) of a full and a cached step, the smaller sizes first.

    Args:
        some: slots that a cached step computes.
    """
    for s, b, (family, spec) in product(slots, batches, specs.items()):
        for kind, active in (("full", s), ("cached", some)):
            makes = {make.__name__: make for make in OPERATIONS.values()}
            if b > 1:
                makes["attention ragged"] = partial(attention, ragged=True)
            if kind == "cached":
                makes["choose drawn"] = partial(choose, drawn=True)
            for name, make in makes.items():
                yield f"{name} {kind} {TITLES[family]} B{b} S{s}", partial(make, Sizes(spec, b, s, active, dtype))


def shares(case: Case, seconds: float, rates: dict[str, float]) -> dict[str, float]:
    """How much of a device's `dkv.bench.machine.rates` a time reaches; the floor takes 1 of the larger."""
    copy, matrix = case.bytes / rates["copy_bytes_per_s"], case.flops / rates["matrix_flops_per_s"]
    return {"copy_share": copy / seconds, "matrix_share": matrix / seconds}


def _started(case: Case, ways: Iterable[str], device: torch.device) -> tuple[dict, dict[str, str]]:
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
            errors[way] = short(error)
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


COLUMNS = {
    "operation": (44, "{name}"),
    **{way: (17, partial(_time, way)) for way in WAYS},
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


def run(report: Report, device: torch.device, backends: list[str], specs: dict[str, ModelSpec], tiny: bool) -> None:
    """Time every wanted operation until the time is over."""
    rates = machine.rates(device, torch.bfloat16)
    report.begin("ops", "milliseconds per call, median and half the range from tenth to ninetieth percentile", **rates)
    print(told(rates, backends[0]), fixed(COLUMNS), sep="\n")
    compiling = 0.0
    sizes = ((48,), (1, 2), 8, torch.float32) if tiny else (SLOTS, BATCHES, ACTIVE, torch.bfloat16)
    for label, make in report.items(items(specs, *sizes)):
        try:
            case = make(device)
        except torch.OutOfMemoryError as error:
            report.row(f"{label:44} out of memory", {"name": label, "errors": {"inputs": short(error)}})
            continue
        ready, errors = _started(case, [*backends, *(way for way in case.others if way != "flex")], device)
        if "flex" in case.others and compiling < FLEX_SHARE * report.limit and device.type == "cuda":
            before = report.spent
            more, problems = _started(case, ["flex"], device)
            compiling, ready, errors = compiling + report.spent - before, ready | more, errors | problems
        values = values_of(label, case, milliseconds(ready, device, 0.3) if ready else {}, errors, rates)
        line = fixed(COLUMNS, values) + "".join(f"\n    {name}: {error}" for name, error in errors.items())
        ours = [errors[name] for name in backends if name in errors]
        report.row(line, values, failed=any("OutOfMemory" not in error for error in ours))
        del case, ready
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.end()
