"""Launches of kernels: tables of tile sizes, warps and stages, and how an entry of them is found, used or recorded."""

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dkv.kernels.common.prepared import Product, Ready, Scratch, filled, form, hooked
from dkv.kernels.common.workspace import Workspace

# Whether the kernels of this process run in Triton's interpreter, on CPU tensors: fixed at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Architectures that use the entries of another one.
_SAME_AS = {"sm_89": "sm_86", "sm_121": "sm_120", "sm_103": "sm_100", "gfx950": "gfx942"}

# Launches that an operation keeps ready: forms of its tensors. A few KB each.
MOST_READY = 4096

# What `start` asks: (tensors, values) -> regime, and launch -> calls.
Plan = Callable[..., tuple[Hashable, Callable[["Launch"], Iterable["Call | Product"]]]]


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
        arguments: all arguments of the kernel by name, see `arguments`. `Scratch` stands for memory.
        rare: does its work only where numbers are not finite or offsets need 64 bits, and may be slow there.
    """

    kernel: Any
    grid: tuple[int, ...]
    launch: Launch
    arguments: dict[str, Any]
    rare: bool = False

    def run(self) -> Any:
        """Start it the plain way; returns what Triton compiled, or None in the interpreter."""
        if (tried := _trial.get()).collecting:
            tried.calls.append(self)
            return None
        how = {"num_warps": self.launch.warps, "num_stages": self.launch.stages}
        return self.kernel[self.grid](**self.arguments, **how)

    def filled(self, memory: Callable[[Scratch], Tensor]) -> "Call":
        """The call with memory for its scratch."""
        return replace(self, arguments={name: filled(x, memory) for name, x in self.arguments.items()})


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
        chip: launches are those that it would get, whatever device has the tensors.
        collect: launches for `chip` are collected and do not run; tensors may be on "meta". Otherwise they go to the
            driver of Triton.
        calls, regimes: that were collected, and what their launchers took the arguments for.
    """

    launch: Launch | None = None
    parts: int | None = None
    chip: Chip | None = None
    collect: bool = True
    calls: list[Call] = field(default_factory=list)
    regimes: list[Hashable] = field(default_factory=list)

    def __post_init__(self):
        self.collecting = self.chip is not None and self.collect
        self.special = self.collecting or self.launch is not None or self.parts is not None


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
        self._ready: dict[Hashable, Ready] = {}

    def launch(self, arch: str, regime: Hashable) -> Launch:
        return self.entries.get(arch, {}).get(regime) or self.entries["default"][regime]

    def on(self, arch: str) -> Iterator[tuple[Hashable, Launch]]:
        """Every regime with what is compiled for `arch`: the launch it uses, and the default if that is another."""
        for regime, default in self.entries["default"].items():
            yield from ((regime, launch) for launch in dict.fromkeys((self.launch(arch, regime), default)))

    def start(
        self, plan: Plan, tensors: tuple[Tensor | None, ...], *values: Hashable, work: Workspace | None = None
    ) -> None:
        """Launch what `plan(*tensors, *values)` says, or collect it for a `trial`.

        A plan goes by the form of the tensors alone, so it is asked once for each and what it says is kept. It gives
        the regime, and what makes calls of a launch; this is asked again, and its calls run again, for every candidate
        that is timed.

        Args:
            plan: a function of a module.
            tensors: all that the kernels read and write; the first, which is not None, has the device.
            values: what else the plan goes by.
            work: for `Scratch` among the arguments of the calls.
        """
        tried, device = _trial.get(), tensors[0].device
        key = None
        if not (INTERPRETED or tried.special or hooked()):
            key = (plan, values, tried.chip, tensors[0].get_device(), form(tensors))
            if ready := self._ready.get(key):
                ready(tensors, work)
                return
        # Different objects, even where two arguments are the same: another time they may not be.
        given = [x if x is None else x.detach() for x in tensors]
        regime, calls = plan(*given, *values)
        arch, work = chip(device).arch, work or Workspace()

        def run(launch: Launch) -> tuple[list[Call | Product], list[Any]]:
            made = list(calls(launch))
            # One memory for all that ask for the same.
            memory = functools.cache(lambda scratch: work.take(*scratch, device))
            return made, [call.run() for call in [call.filled(memory) for call in made]]

        if tried.collecting:
            tried.regimes.append(regime)
            run(tried.launch or self.launch(arch, regime))
            return
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            launch, settled = (tried.launch, False) if tried.launch else self._best(arch, regime, run)
            made, compiled = run(launch)
        if key and settled:
            if len(self._ready) == MOST_READY:
                self._ready.clear()
            self._ready[key] = Ready(made, compiled, given, key[3])

    def _best(self, arch: str, regime: Hashable, run: Callable[[Launch], Any]) -> tuple[Launch, bool]:
        """The entry of the device, or with `DKV_AUTOTUNE=1` the fastest of all; and whether it stays that."""
        if (arch, regime) in self._tuned:
            return self._tuned[arch, regime], True
        if os.environ.get("DKV_AUTOTUNE") != "1" or not self.candidates or arch == "interpreter":
            return self.launch(arch, regime), True
        if torch.cuda.is_current_stream_capturing():  # where nothing can be timed
            return self.launch(arch, regime), False
        from dkv.kernels.dev.autotune import search

        self._tuned[arch, regime] = search(self, arch, regime, run)
        return self._tuned[arch, regime], True


def pretended() -> bool:
    """Whether launches are those of a chip that need not be there, from tensors of any device."""
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
    return Chip(entries_of(arch), properties.multi_processor_count)


def entries_of(arch: str) -> str:
    """The architecture by which the launch tables know `arch`."""
    return _SAME_AS.get(arch, arch)


def batch_invariant() -> bool:
    """Whether a row must give the same bits in any company (`DKV_BATCH_INVARIANT=1`).

    Work is then divided as for one row, and small batches pay for a larger merge.
    """
    return os.environ.get("DKV_BATCH_INVARIANT") == "1"


def splits(device: torch.device, programs: int, limit: int, *, each: int = 1) -> int:
    """In how many parts to divide the work of each of `programs`, so that the device is filled.

    Known from shapes alone, unless a `trial` says it.

    Args:
        programs: of the whole batch; where rows are to be `batch_invariant`, of one row.
        limit: the most parts that make sense.
        each: programs that a processor runs at a time.

    Returns:
        A power of two.
    """
    if parts := _trial.get().parts:
        return parts
    wanted = max(1, min(each * chip(device).processors // max(programs, 1), limit))
    return 1 << (wanted.bit_length() - 1)
