"""Part `profile`: what bounds a step. The host, the device, its products alone, its operations, its kernels."""

import gc
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import dkv
from dkv.bench.gpu import alone
from dkv.bench.gpu.cases import Sizes, running
from dkv.bench.gpu.lab import TITLES, Lab
from dkv.bench.gpu.operations import OPERATIONS
from dkv.bench.gpu.report import Report, must_answer, short
from dkv.bench.gpu.tools import variable
from dkv.bench.machine import median_seconds
from dkv.bench.report import fixed
from dkv.bench.steps import begin
from dkv.bench.timing import enqueued, synchronise
from dkv.engine.engine import Engine
from dkv.engine.graphs import LEAST_AHEAD
from dkv.kernels import use_backend
from dkv.models import Transformer
from dkv.models.counting import read_bytes
from dkv.models.weight_only import BITS

# By the weights, "" or a key of `BITS`, the model.
Made = Callable[[str], Transformer]
# With these weights a full step, too, whose many rows a kernel for few has to take as well.
FULL_TOO = "int8"
# Steps that are taken of each kind, the first of which compile, allocate and capture.
STEPS, WARM = 14, 2
# Calls in a row, fewer than a GPU's queue holds, and how often.
CALLS, BLOCKS = 100, 5
# The lines of a kernel table that are printed.
SHOWN = 12


@torch.no_grad()
def run(report: Report, lab: Lab) -> None:
    """Profile the steps of the first model until the time is over."""
    family = next(iter(lab.specs))
    report.begin("profile", f"a step of {TITLES[family]}, batch 1: milliseconds")
    print(fixed(COLUMNS))
    with use_backend(lab.backends[0]):
        for name, item in report.items(items(lab, family)):
            report.attempt(name, lab.device, partial(item, report, name))
            gc.collect()
    report.end()


def items(lab: Lab, family: str) -> Iterator[tuple[str, Callable[[Report, str], None]]]:
    """By name, what is measured, what decides most first."""
    # Beside each other as they take turns, and each made when it is asked for.
    made = cache(partial(lab.model, family))
    plain = partial(made, "")
    yield "weights at copy bandwidth", partial(weights, lab, made, "")
    for slots in lab.slots:
        yield step_name(slots, lab.active[0]), partial(step, lab, made, family, slots, lab.active[0], "")
        for bits in BITS:
            if slots == lab.slots[0]:
                yield f"{bits} weights at copy bandwidth", partial(weights, lab, made, bits)
            name = f"{step_name(slots, lab.active[0])} {bits}"
            yield name, partial(step, lab, made, family, slots, lab.active[0], bits)
        for active in (None, *lab.active[1:]):
            yield step_name(slots, active), partial(step, lab, made, family, slots, active, "")
        if slots == lab.slots[0]:
            yield f"{step_name(slots, None)} {FULL_TOO}", partial(step, lab, made, family, slots, None, FULL_TOO)
    yield "host, microseconds a call", partial(host, lab, family)
    middle = lab.slots[len(lab.slots) // 2]
    for active in (lab.active[0], None):
        yield f"kernels, {step_name(middle, active)}", partial(table, lab, plain, family, middle, active)


def step_name(slots: int, active: int | None) -> str:
    return f"S{slots} {'full' if active is None else f'cached N{active}'}"


def weights(lab: Lab, made: Made, bits: str, report: Report, name: str) -> None:
    """What a cached step reads at least: every weight but the table of embeddings, at the rate of a copy."""
    size = read_bytes(made(bits), 0).most
    source, target = (torch.ones(size // 2, dtype=torch.uint8, device=lab.device) for _ in range(2))
    seconds = median_seconds(lambda: target.copy_(source), lab.device)
    values = {"name": name, "weights": bits, "bytes": size, "ms": seconds * 1e3, "bytes_per_s": size / seconds}
    report.row(f"{name:31} {values['ms']:8.3f} ms for {size / 1e9:.2f} GB, {size / seconds / 1e12:.2f} TB/s", values)


def generation(lab: Lab, model: Transformer, family: str, slots: int, active: int | None, graphs: bool) -> Engine:
    """A generation whose next steps compute all slots, or `active` of them in the middle of `steps`."""
    new, settings = lab.new, {"cache": dkv.NoCache()}
    if active is not None:
        # Every step fills one slot, and the next one computes one fewer.
        new, settings = active + steps(lab, active) // 2, {"cache": dkv.DecodeCache(refresh=0, warmup=1)}
        # Of few steps none is captured; more slots are filled up to the same number of entries.
        new = max(new, LEAST_AHEAD + 2) if graphs else new
    with variable("DKV_GRAPHS", str(int(graphs))):
        engine = begin(model, lab.prompts(family, 1, slots - new), None, new, settings)
    if active is not None:
        engine.step()
    return engine


def steps(lab: Lab, active: int | None) -> int:
    """How many steps a generation is profiled for: all of about as many slots."""
    return min(STEPS, lab.new if active is None else active + 2)


def step(
    lab: Lab, made: Made, family: str, slots: int, active: int | None, bits: str, report: Report, name: str
) -> None:
    """One kind of step: launched as it comes, replayed, and its parts alone."""
    values: dict[str, Any] = {"name": name, "slots": slots, "active": active, "weights": bits}
    make, count = partial(generation, lab, made(bits), family, slots, active), steps(lab, active)
    engine = make(graphs=False)
    shape = engine.shape()
    taken = [enqueued(partial(engine.advance, shape), lab.device) for _ in range(count - 1)][WARM:]
    values["host_ms"], values["waited_ms"] = (statistics.median(times) * 1e3 for times in zip(*taken, strict=True))
    values["shape"] = str(shape)
    with alone.Recorder() as recorder:
        engine.advance(shape)
    synchronise(lab.device)
    del engine
    values |= replays(lab, make(graphs=True), count)
    values |= parts(lab, recorder.with_head())
    report.row(fixed(COLUMNS, values), values)


def replays(lab: Lab, engine: Engine, count: int) -> dict[str, Any]:
    """Of steps that are replayed from a graph: how long the host takes, with the wait, and the device."""
    shape, waited, device = engine.shape(), [], []
    for number in range(count):
        if engine.runner is None:
            return {"eager_reason": engine.stats.eager_reason}
        before = engine.stats.replayed_passes
        take = partial(engine.runner.advance, shape)
        if number % 2:
            waited.append(enqueued(take, lab.device))
        else:
            device.append(alone.once(take, lab.device))
        if number < WARM or engine.stats.replayed_passes == before:
            (waited if number % 2 else device).pop()
    if not waited or not device:
        return {"eager_reason": "no step was replayed"}
    host, whole = (statistics.median(times) * 1e3 for times in zip(*waited, strict=True))
    found = {"replay_host_ms": host, "replay_waited_ms": whole, "device_ms": statistics.median(device)}
    return found | {"graph_bytes": engine.stats.graph_bytes}


def parts(lab: Lab, calls: alone.Calls) -> dict[str, Any]:
    """The products of a step alone, and each of its operations, milliseconds; and what fails of it."""
    found: dict[str, Any] = {"alone_ms": {}, "alone_calls": {name: len(of) for name, of in calls.items()}}
    for name in list(calls):
        try:
            found["alone_ms"][name] = alone.milliseconds(calls.pop(name), lab.device)
        except Exception as error:
            found.setdefault("errors", {})[name] = short(error)
            must_answer(lab.device, name)
    return found


def _alone(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda values: f"{values['alone_ms'][name]:.3f}" if name in values["alone_ms"] else "-"


COLUMNS = {
    "step": (22, "{name}"),
    "host": (8, "{host_ms:.3f}"),
    "+ wait": (8, "{waited_ms:.3f}"),
    "replay": (8, "{replay_host_ms:.3f}"),
    "+ wait ": (8, "{replay_waited_ms:.3f}"),
    "device": (8, "{device_ms:.3f}"),
    "products": (8, _alone("products")),
    "attend": (8, _alone("cached_attention")),
    "scatter": (8, _alone("rope_scatter_")),
    "norms": (8, _alone("rms_norm")),
    "gates": (8, _alone("swiglu")),
    "choice": (8, _alone("choose_token_fused")),
    "": (0, "not replayed: {eager_reason}"),
}


def host(lab: Lab, family: str, report: Report, name: str) -> None:
    """Microseconds that the host takes to send a call: of PyTorch, a bare Triton launch, and each operation."""
    z = Sizes(lab.specs[family], 1, lab.slots[0], min(32, lab.slots[0]), lab.dtype)
    x, square = torch.zeros(64, device=lab.device), torch.zeros(64, 64, device=lab.device, dtype=lab.dtype)
    calls = {"aten add_": lambda: x.add_(1), "aten mm": lambda: square @ square}
    if lab.backends[0] == "triton":
        from dkv.bench.gpu import bare

        calls["bare Triton"] = lambda: bare.launch(x)
    values: dict[str, Any] = {"name": name, "us": {}}
    with running(lab.backends[0]):
        calls |= {case: make(z, lab.device).call(lab.backends[0]) for case, make in OPERATIONS.items()}
        for label, call in calls.items():
            try:
                call()
                sent = [enqueued(partial(_often, call), lab.device)[0] for _ in range(BLOCKS)]
            except Exception as error:
                values.setdefault("errors", {})[label] = short(error)
                must_answer(lab.device, label)
            else:
                values["us"][label] = statistics.median(sent) / CALLS * 1e6
    report.row(f"{name}: " + ", ".join(f"{label} {us:.1f}" for label, us in values["us"].items()), values)


def _often(call: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        call()


def table(
    lab: Lab, model: Callable[[], Transformer], family: str, slots: int, active: int | None, report: Report, name: str
) -> None:
    """The kernels of a step that is launched as it comes, by the time that they take on the device."""
    engine = generation(lab, model(), family, slots, active, graphs=False)
    shape = engine.shape()
    for _ in range(WARM):
        engine.advance(shape)
    synchronise(lab.device)
    kind = torch.autograd.DeviceType.CUDA if lab.gpu else torch.autograd.DeviceType.CPU
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if lab.gpu else [])]) as profiled:
        engine.advance(shape)
        synchronise(lab.device)
    count, took = Counter(), Counter()
    for event in profiled.events():
        if event.device_type == kind:
            count[event.name] += 1
            took[event.name] += event.time_range.elapsed_us()
    rows = [{"kernel": kernel, "launches": count[kernel], "us": us} for kernel, us in took.most_common()]
    values = {"name": name, "launches": sum(count.values()), "us": sum(took.values()), "kernels": rows}
    shown = [f"  {row['us']:9.1f} us {row['launches']:5} x  {row['kernel'][:90]}" for row in rows[:SHOWN]]
    report.row("\n".join([f"{name}: {values['launches']} launches, {values['us']:.0f} us", *shown]), values)
