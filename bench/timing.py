"""The timer: calls on a device, and contenders that take turns, so that what slows the machine slows all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from dkv.common.bar import Bar

Key, Found = TypeVar("Key"), TypeVar("Found")


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
