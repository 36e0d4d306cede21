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
        The `spread` of each.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def started(call: Callable[[], Any]) -> Callable[[], float]:
        """What gives the milliseconds of a call once the device has finished."""
        if flush is None:
            taken, _ = timed(call, device)
            return lambda: taken * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Also gives the host time to queue the call, so that its launches are not what is timed.
        flush.zero_()
        first.record()
        call()
        last.record()
        return lambda: first.elapsed_time(last)

    def turns(rounds: int) -> dict[str, list[float]]:
        synchronise(device)
        pending = in_turn({name: partial(started, call) for name, call in contenders.items()}, rounds)
        synchronise(device)
        return {name: [elapsed() for elapsed in every] for name, every in pending.items()}

    longest = max(ms for (ms,) in turns(1).values())
    rounds = 2 if flush is None else int(min(MOST, max(FEWEST, seconds * 1e3 / max(longest, 1e-3))))
    return {name: spread(ms) for name, ms in turns(rounds).items()}


def spread(times: Iterable[float]) -> dict[str, float]:
    """Their "median", and "low" and "high", the tenth and the ninetieth percentile."""
    found = sorted(times)
    low, high = (found[round((len(found) - 1) * share)] for share in (0.1, 0.9))
    return {"median": statistics.median(found), "low": low, "high": high}
