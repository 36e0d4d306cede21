"""The gated activation in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.common.arguments import computable, restored
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, calls_of, meta
from dkv.kernels.gate import torch as fallback
from dkv.kernels.gate.kernel import swiglu_kernel

# Tile: (rows, columns). One regime: all. 8 numbers to a lane, which is 128 bits of 2-byte ones. None has been timed on
# a GPU; `dkv audit` finds no spilled registers.
TABLE = LaunchTable(
    "swiglu",
    {"default": {"all": Launch((1, 1024), 4)}, "interpreter": {"all": Launch((64, 1024), 4)}},
    [Launch((1, 256 * warps), warps) for warps in (1, 2, 4, 8)] + [Launch((2, 512), 4)],
)


def swiglu(gate_up):
    if gate_up.dtype == torch.float64:
        return fallback.swiglu(gate_up)
    x = computable(gate_up.contiguous())
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    if out.numel():
        TABLE.start(_plan, (x, out))
    return restored(out, gate_up.dtype)


def _plan(x, out):
    size = out.shape[-1]
    total = out.numel() // size

    def calls(launch: Launch) -> list[Call]:
        rows, columns = launch.tile
        arguments = {"gate_up": x, "out": out, "rows": total, "D": size, "ROWS": rows, "BLOCK": columns}
        return [Call(swiglu_kernel, (triton.cdiv(total, rows), triton.cdiv(size, columns)), launch, arguments)]

    return "all", calls


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch on rows that fill the tile, and on some that do not."""
    for regime, launch in TABLE.on(arch):
        for dtype, size in (("bf16", 12288), ("fp32", 1001)):
            (call,) = calls_of(arch, regime, launch, swiglu, meta(33, 2 * size, dtype=dtype))
            yield Case(f"swiglu {dtype} {'x'.join(map(str, launch.tile))}", call)
