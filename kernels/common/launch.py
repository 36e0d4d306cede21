"""Launches of kernels: tables of tile sizes, warps and stages, and how an entry of them is found, used or recorded."""

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton

# Whether the kernels of this process run in Triton's interpreter, on CPU tensors: fixed at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Chips that use the entries of another one of their family.
_SAME_AS = {"sm_103": "sm_100", "gfx950": "gfx942"}


@dataclass(frozen=True)
class Launch:
    """One entry of a launch table.

    Attributes:
        tile: sizes of a program's tile, in the order that the operation's table names.
        warps: warps of 32 (AMD: 64) lanes per program.
        stages: loads in flight in a pipelined loop.
    """

    tile: tuple[int, ...]
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class Call:
    """One launch of a kernel, made ready: what runs on a device, and what `dkv audit` compiles.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: how many programs.
        launch: whose warps and stages are used.
        arguments: all arguments of the kernel by name, see `arguments`.
        rare: does its work only where numbers are not finite or offsets need 64 bits, and may be slow there.
    """

    kernel: Any
    grid: tuple[int, ...]
    launch: Launch
    arguments: dict[str, Any]
    rare: bool = False

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.launch.warps, num_stages=self.launch.stages)


class Chip(NamedTuple):
    """A GPU as the launch tables see it: its architecture and how many multiprocessors it has."""

    arch: str
    processors: int


@dataclass
class Trial:
    """What is done in place of plain launches, for a test or the audit.

    Attributes:
        launch: used in place of that of the table.
        parts: in how many parts work is divided, if the device is not to decide.
        chip: launches are collected as they would be on it, and do not run. Tensors may be on "meta".
        calls, regimes: that were collected, and what their launchers took the arguments for.
    """

    launch: Launch | None = None
    parts: int | None = None
    chip: Chip | None = None
    calls: list[Call] = field(default_factory=list)
    regimes: list[Hashable] = field(default_factory=list)


_PLAIN = Trial()
_trial: ContextVar[Trial] = ContextVar("dkv_trial", default=_PLAIN)


@contextlib.contextmanager
def trial(**how: Any) -> Iterator[Trial]:
    """A `Trial` of the launches inside the `with` block."""
    token = _trial.set(Trial(**how))
    try:
        yield _trial.get()
    finally:
        _trial.reset(token)


class LaunchTable:
    """The launches of one operation: for every architecture and regime, and a default for every regime.

    The default entries fit every architecture. Entries under "interpreter" have large tiles, as its cost
    is per tile.

    Args:
        name: of the operation.
        entries: {architecture or "default": {regime: launch}}.
        candidates: launches that `DKV_AUTOTUNE=1` tries on a GPU.
    """

    def __init__(self, name: str, entries: Mapping[str, Mapping[Hashable, Launch]], candidates: Iterable[Launch] = ()):
        self.name, self.candidates = name, tuple(candidates)
        self.entries = MappingProxyType({arch: MappingProxyType(dict(of_arch)) for arch, of_arch in entries.items()})
        self._tuned: dict[tuple[str, Hashable], Launch] = {}

    def launch(self, arch: str, regime: Hashable) -> Launch:
        return self.entries.get(arch, {}).get(regime) or self.entries["default"][regime]

    def on(self, arch: str) -> Iterator[tuple[Hashable, Launch]]:
        """Every regime with what is compiled for `arch`: the launch it uses, and the default if that is another."""
        for regime, default in self.entries["default"].items():
            yield from ((regime, launch) for launch in dict.fromkeys((self.launch(arch, regime), default)))

    def start(self, device: torch.device, regime: Hashable, calls: Callable[[Launch], list[Call]]) -> None:
        """Run what `calls` makes of the launch of the device, or collect it for a `trial`.

        `calls` is asked again, and its calls run again, for every candidate that is timed.
        """
        arch, tried = chip(device).arch, _trial.get()
        if tried.chip is not None:
            tried.regimes.append(regime)
            tried.calls.extend(calls(tried.launch or self.launch(arch, regime)))
            return

        def run(launch: Launch) -> None:
            for call in calls(launch):
                call.run()

        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            run(tried.launch or self._best(arch, regime, run))

    def _best(self, arch: str, regime: Hashable, run: Callable[[Launch], None]) -> Launch:
        """The entry of the device; with `DKV_AUTOTUNE=1` the fastest of it and the candidates, from now on."""
        if (arch, regime) in self._tuned:
            return self._tuned[arch, regime]
        if os.environ.get("DKV_AUTOTUNE") != "1" or not self.candidates or arch == "interpreter":
            return self.launch(arch, regime)
        if torch.cuda.is_current_stream_capturing():  # where nothing can be timed
            return self.launch(arch, regime)
        from dkv.kernels.dev.autotune import search

        self._tuned[arch, regime] = search(self, arch, regime, run)
        return self._tuned[arch, regime]


def collecting() -> bool:
    """Whether launches are collected and do not run."""
    return _trial.get().chip is not None


def chip(device: torch.device) -> Chip:
    """The chip of a device, or that of which launches are collected."""
    return _trial.get().chip or chip_of(device)


@functools.cache
def chip_of(device: torch.device) -> Chip:
    if INTERPRETED:
        return Chip("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    rocm = torch.version.hip is not None
    arch = properties.gcnArchName.partition(":")[0] if rocm else f"sm_{properties.major}{properties.minor}"
    return Chip(_SAME_AS.get(arch, arch), properties.multi_processor_count)


def batch_invariant() -> bool:
    """Whether a row must give the same bits in any company (`DKV_BATCH_INVARIANT=1`)."""
    return os.environ.get("DKV_BATCH_INVARIANT") == "1"


def splits(device: torch.device, programs: int, batch: int, limit: int, *, each: int = 1) -> int:
    """In how many parts to divide the work of each of `programs`, so that the device is filled.

    Known from shapes alone, unless a `trial` says it. With `DKV_BATCH_INVARIANT=1` a batch is divided as one row of it
    is, so that a row gives the same bits in any company; small batches then pay for a larger merge.

    Args:
        programs: of the whole batch.
        batch: rows in it.
        limit: the most parts that make sense.
        each: programs that a processor runs at a time.

    Returns:
        A power of two.
    """
    if parts := _trial.get().parts:
        return parts
    if batch_invariant():
        programs //= max(batch, 1)
    wanted = max(1, min(each * chip(device).processors // max(programs, 1), limit))
    return 1 << (wanted.bit_length() - 1)
