"""Tile sizes, warps and stages: checked-in tables, and how a row of them is found and used."""

import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
from torch import Tensor

# Whether the kernels of this process run in Triton's interpreter, on CPU tensors: fixed at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Chips that run the rows of another one of their family.
_SAME_AS = {"sm_103": "sm_100", "gfx950": "gfx942"}


@dataclass(frozen=True)
class Launch:
    """One row of a launch table.

    Attributes:
        tile: sizes of a program's tile, in the order that the operation's table names.
        warps: warps of 32 (AMD: 64) lanes per program.
        stages: loads in flight in a pipelined loop.
    """

    tile: tuple[int, ...]
    warps: int
    stages: int = 1


class LaunchTable:
    """The launches of one operation: for every architecture and regime, and a default for every regime.

    The default rows fit every architecture. Rows under "interpreter" have large tiles, as its cost
    is per tile.

    Args:
        name: of the operation.
        rows: {architecture or "default": {regime: row}}.
        candidates: rows that `DKV_AUTOTUNE=1` tries on a GPU.
    """

    def __init__(self, name: str, rows: Mapping[str, Mapping[Hashable, Launch]], candidates: tuple[Launch, ...] = ()):
        self.name, self.candidates = name, candidates
        self.rows = MappingProxyType({arch: MappingProxyType(dict(of_arch)) for arch, of_arch in rows.items()})
        self._found: dict[tuple[str, Hashable], Launch] = {}

    def row(self, arch: str, regime: Hashable) -> Launch:
        return self.rows.get(arch, {}).get(regime) or self.rows["default"][regime]

    def on(self, arch: str) -> Iterator[tuple[Hashable, Launch]]:
        """Every regime with the rows that are compiled for `arch`: what it runs, and the default if that is another."""
        for regime, default in self.rows["default"].items():
            yield from ((regime, row) for row in dict.fromkeys((self.row(arch, regime), default)))

    def start(
        self, device: torch.device, regime: Hashable, run: Callable[[Launch], None], row: Launch | None = None
    ) -> None:
        """Run with `row`, or that of the device; `run` gives the same result however often it is called."""
        arch, _ = chip(device)
        with on_device(device):
            run(row or self._found.get((arch, regime)) or self._tuned(arch, regime, run) or self.row(arch, regime))

    def _tuned(self, arch: str, regime: Hashable, run: Callable[[Launch], None]) -> Launch | None:
        """With `DKV_AUTOTUNE=1` the fastest row, from now on; None where nothing can be timed."""
        if os.environ.get("DKV_AUTOTUNE") != "1" or not self.candidates or arch == "interpreter":
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        from dkv.kernels.triton_backend.autotune import search

        self._found[arch, regime] = search(self, arch, regime, run)
        return self._found[arch, regime]


@functools.cache
def chip(device: torch.device) -> tuple[str, int]:
    """Architecture, as the tables name it, and number of multiprocessors."""
    if INTERPRETED:
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    rocm = torch.version.hip is not None
    arch = properties.gcnArchName.partition(":")[0] if rocm else f"sm_{properties.major}{properties.minor}"
    return _SAME_AS.get(arch, arch), properties.multi_processor_count


def on_device(device: torch.device) -> torch.cuda.device:
    """Make the device current, as Triton launches on the current one wherever the tensors are."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def batch_invariant() -> bool:
    """Whether a row must give the same bits in any company (`DKV_BATCH_INVARIANT=1`)."""
    return os.environ.get("DKV_BATCH_INVARIANT") == "1"


def splits(device: torch.device, programs: int, batch: int, limit: int, *, each: int = 1) -> int:
    """In how many parts to divide the work of each of `programs`, so that the device is filled.

    Known from shapes alone. With `DKV_BATCH_INVARIANT=1` a batch is divided as one row of it is, so
    that a row gives the same bits in any company; small batches then pay for a larger merge.

    Args:
        programs: of the whole batch.
        batch: rows in it.
        limit: the most parts that make sense.
        each: programs that a processor runs at a time.

    Returns:
        A power of two.
    """
    if batch_invariant():
        programs //= max(batch, 1)
    wanted = max(1, min(each * chip(device)[1] // max(programs, 1), limit))
    return 1 << (wanted.bit_length() - 1)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return triton.next_power_of_2(n)


def computable(x: Tensor) -> Tensor:
    """x, in float32 if it is bfloat16 in the interpreter, which multiplies the bit patterns of those."""
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not dense: the only layout that the kernels do not read in place."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of an argument that may be missing."""
    return (0,) * dims if x is None else x.stride()


def precision(x: Tensor) -> str:
    """How float32 is multiplied: three TF32 products on NVIDIA, which lose next to nothing."""
    return "ieee" if INTERPRETED or torch.version.hip or x.element_size() < 4 else "tf32x3"
