"""The change of hidden states, and their store, in Triton."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from dkv.kernels.change import torch as fallback
from dkv.kernels.change.kernel import keep_rows_kernel, row_change_kernel
from dkv.kernels.change.reference import EPS
from dkv.kernels.common.arguments import computable, restored, strided
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, calls_of, meta

# Tile: (entries,). Regime: numbers of an entry up to. A lane holds 16 numbers of it where it is long enough. None has
# been timed on a GPU; `dkv audit` finds no spilled registers.
SIZES = {512: 1, 1024: 2, 2048: 4, 4096: 8, 8192: 16, 16384: 16}
LARGEST = max(SIZES)
TILES = {
    "default": {size: Launch((1,), warps) for size, warps in SIZES.items()},
    "interpreter": {size: Launch((max(1, 65536 // size),), 1) for size in SIZES},
}
CANDIDATES = [Launch((entries,), warps) for entries in (1, 2, 4) for warps in (1, 2, 4, 8, 16)]
CHANGE, KEEP = (LaunchTable(name, TILES, CANDIDATES) for name in ("row_change", "keep_rows_"))


def row_change(x, delta, kept, positions, rows):
    if not _fits(x, delta, kept):
        return fallback.row_change(x, delta, kept, positions, rows)
    x, delta = _dense(x), _dense(delta)
    out = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        CHANGE.start(_change, (x, delta, computable(kept), positions.contiguous(), rows.contiguous(), out))
    return out


def _change(x, delta, kept, positions, rows, out):
    given = {"x": x, "delta": delta, "kept": kept, "positions": positions, "rows": rows, "out": out}
    return _plan(row_change_kernel, given | {"EPS": EPS}, kept, len(x))


def keep_rows_(x, delta, kept, positions, rows, entries):
    if not _fits(x, delta, kept):
        return fallback.keep_rows_(x, delta, kept, positions, rows, entries)
    dtype, written = x.dtype, computable(kept)
    x, delta, index = _dense(x), _dense(delta), None if entries is None else entries.contiguous()
    out = x.new_empty(len(positions), x.shape[1])
    if len(out):
        KEEP.start(_keep, (x, delta, written, positions.contiguous(), rows.contiguous(), index, out))
    if written is not kept:
        kept.copy_(written)
    return restored(out, dtype)


def _keep(x, delta, kept, positions, rows, entries, out):
    given = {"x": x, "delta": delta, "kept": kept, "positions": positions, "rows": rows, "entries": entries, "out": out}
    return _plan(keep_rows_kernel, given, kept, len(out))


def _plan(kernel: Any, given: dict[str, Any], kept: Tensor, count: int) -> tuple[int, Any]:
    """The regime, and the one call of a launch."""
    size = kept.shape[2]
    given |= {"kept": strided(kept), "count": count, "D": size, "BLOCK": triton.next_power_of_2(size)}

    def calls(launch: Launch) -> list[Call]:
        (tile,) = launch.tile
        return [Call(kernel, (triton.cdiv(count, tile),), launch, given | {"ROWS": tile})]

    return next(most for most in SIZES if size <= most), calls


def _fits(x: Tensor, delta: Tensor | None, kept: Tensor) -> bool:
    """Whether the kernels take these. Under autocast dtypes may differ, and PyTorch promotes."""
    alike = kept.dtype == x.dtype and (delta is None or delta.dtype == x.dtype)
    return alike and x.dtype != torch.float64 and x.shape[-1] <= LARGEST


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else computable(x.contiguous())


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch with all that is optional and without, and states that do not fill the tile."""
    for regime, launch in CHANGE.on(arch):
        for dtype, added, size in (("bf16", False, regime), ("bf16", True, regime), ("fp32", True, regime - 16)):
            x, kept, index = meta(33, size, dtype=dtype), meta(2, 1001, size, dtype=dtype), meta(33, dtype=torch.int64)
            given = (x, x if added else None, kept, index, index)
            for function, args in ((row_change, given), (keep_rows_, (*given, index if added else None))):
                (call,) = calls_of(arch, regime, launch, function, *args)
                yield Case(f"{function.__name__} {dtype} {size}{' added' if added else ''} {launch.tile[0]}", call)
