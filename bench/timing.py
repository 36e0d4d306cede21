"""The timer: calls on a device, and contenders that take turns, so that what slows the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from dkv.common.bar import Bar

Key, Found = TypeVar("Key"), TypeVar("Found")
# What is written between two timed calls on a GPU, more than its cache holds; and how often each is called.
FLUSH_BYTES = 256 << 20
FEWEST, MOST = 5, 60
# A GPU's clock is no faster than this, so that as many cycles take at least as long as they should.
CYCLES_PER_SECOND = 2e9
# How long a GPU is kept busy at most while a call is sent to it; and beside the time that sending takes.
MOST_AHEAD, SPARE = 0.02, 1e-4


def synchronise(device: torch.device) -> None:
    """Wait for what was sent to a GPU, so that a clock read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call on a device, and its result."""
    synchronise(device)
    begin = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - begin, result


def enqueued(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds until a call has been sent to an idle device, and until the device has done it."""
    synchronise(device)
    begin = time.perf_counter()
    call()
    sent = time.perf_counter()
    synchronise(device)
    return sent - begin, time.perf_counter() - begin


def occupy(device: torch.device, seconds: float) -> None:
    """Keep a GPU busy for at least so long: what is sent meanwhile then runs without waiting for its launches."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


def on_device(call: Callable[[], Any], device: torch.device, ahead: float) -> Callable[[], float]:
    """Send a call; returns what gives the milliseconds that the device took for it, once it has finished.

    Args:
        call: if it waits for the device, its own waits count.
        device: elsewhere than on a GPU a clock is read, and there is nothing to wait for.
        ahead: seconds that sending it may take.
    """
    if device.type != "cuda":
        taken, _ = timed(call, device)
        return lambda: taken * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    occupy(device, min(ahead, MOST_AHEAD))
    first.record()
    call()
    last.record()
    return lambda: first.elapsed_time(last)


def in_turn(
    contenders: Mapping[Key, Callable[[], Found]],
    rounds: int = 1,
    bar: Bar | None = None,
    told: Callable[[int, Key], str] | None = None,
) -> dict[Key, list[Found]]:
    """What every contender returned, by round. A round calls each of them once; ratios are taken within a round.

    Args:
        bar: counts the calls.
        told: round, from 0, and contender -> what the bar says of a call.
    """
    found: dict[Key, list[Found]] = {key: [] for key in contenders}
    for number in range(rounds):
        for key, call in contenders.items():
            if bar is not None and told is not None:
                bar.set_description(told(number, key))
            found[key].append(call())
            if bar is not None:
                bar.update()
    return found


def milliseconds(
    contenders: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, dict[str, float]]:
    """Of single calls in turn, each with a cold cache as in a model, where every layer has its own buffers.

    Args:
        contenders: calls that have run before.
        device: a GPU is timed by its own events; elsewhere the times only rehearse the script.
        seconds: about how long to measure each contender.

    Returns:
        The `spread` of each; of a GPU also "host", the milliseconds that it takes to send the call.
    """
    gpu = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if gpu else None
    host = {name: min(enqueued(call, device)[0] for _ in range(3)) if gpu else 0.0 for name, call in contenders.items()}

    def started(name: str) -> Callable[[], float]:
        if flush is not None:
            flush.zero_()
        return on_device(contenders[name], device, 2 * host[name] + SPARE)

    def turns(rounds: int) -> dict[str, list[float]]:
        synchronise(device)
        pending = in_turn({name: partial(started, name) for name in contenders}, rounds)
        synchronise(device)
        return {name: [elapsed() for elapsed in every] for name, every in pending.items()}

    longest = max(ms for (ms,) in turns(1).values())
    rounds = int(min(MOST, max(FEWEST, seconds * 1e3 / max(longest, 1e-3)))) if gpu else 2
    found = {name: spread(ms) for name, ms in turns(rounds).items()}
    return {name: ms | ({"host": host[name] * 1e3} if gpu else {}) for name, ms in found.items()}


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """What replays a call from a CUDA graph; without a GPU the call itself. It runs once before it is captured.

    Raises:
        RuntimeError: CUDA refuses something in it, or memory is short.
    """
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call()
    return graph.replay


def spread(times: Iterable[float]) -> dict[str, float]:
    """Their "median", and "low" and "high", the tenth and the ninetieth percentile."""
    found = sorted(times)
    low, high = (found[round((len(found) - 1) * share)] for share in (0.1, 0.9))
    return {"median": statistics.median(found), "low": low, "high": high}
