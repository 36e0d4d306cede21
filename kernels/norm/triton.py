"""The norm of hidden states in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.common.arguments import computable, restored
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, calls_of, meta
from dkv.kernels.norm import torch as fallback
from dkv.kernels.norm.kernel import rms_norm_kernel

# Tile: (rows,). Regime: numbers of a row up to. A lane holds 16 numbers of a row where it is long enough. None has been
# timed on a GPU; `dkv audit` finds no spilled registers.
SIZES = {512: 1, 1024: 2, 2048: 4, 4096: 8, 8192: 16, 16384: 16}
LARGEST = max(SIZES)
TABLE = LaunchTable(
    "rms_norm",
    {
        "default": {size: Launch((1,), warps) for size, warps in SIZES.items()},
        "interpreter": {size: Launch((max(1, 65536 // size),), 1) for size in SIZES},
    },
    [Launch((rows,), warps) for rows in (1, 2, 4) for warps in (1, 2, 4, 8, 16)],
)


def rms_norm(x, gain, eps, residual):
    dtype = x.dtype
    # Under autocast they may differ, and PyTorch promotes.
    alike = gain.dtype == dtype and (residual is None or residual.dtype == dtype)
    if not alike or dtype == torch.float64 or x.shape[-1] > LARGEST:
        return fallback.rms_norm(x, gain, eps, residual)
    x, gain, total = computable(x.contiguous()), computable(gain.contiguous()), None
    if residual is not None:
        residual, total = computable(residual.contiguous()), torch.empty_like(x)
    out = torch.empty_like(x)
    if out.numel():
        TABLE.start(_plan, (x, residual, gain, out, total), eps)
    return restored(out, dtype), total if total is None else restored(total, dtype)


def _plan(x, residual, gain, out, total, eps):
    size, rows = x.shape[-1], x.shape[:-1].numel()
    arguments = {"x": x, "residual": residual, "gain": gain, "out": out, "total": total, "rows": rows, "eps": eps}
    arguments |= {"D": size, "BLOCK": triton.next_power_of_2(size)}

    def calls(launch: Launch) -> list[Call]:
        (tile,) = launch.tile
        return [Call(rms_norm_kernel, (triton.cdiv(rows, tile),), launch, arguments | {"ROWS": tile})]

    return next(most for most in SIZES if size <= most), calls


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch with and without a residual, and rows that do not fill the tile."""
    for regime, launch in TABLE.on(arch):
        for dtype, added, size in (("bf16", False, regime), ("bf16", True, regime), ("fp32", True, regime - 16)):
            x = meta(33, size, dtype=dtype)
            given = (x, meta(size, dtype=dtype), 1e-6, x if added else None)
            (call,) = calls_of(arch, regime, launch, rms_norm, *given)
            yield Case(f"rms_norm {dtype} {size}{' added' if added else ''} {launch.tile[0]}", call)
