"""The gated activation in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.common.arguments import computable
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
    x, size = computable(gate_up.contiguous()), gate_up.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))

    def calls(launch: Launch) -> list[Call]:
        (rows, columns), total = launch.tile, out.numel() // size
        arguments = {"gate_up": x, "out": out, "rows": total, "D": size, "ROWS": rows, "BLOCK": columns}
        return [Call(swiglu_kernel, (triton.cdiv(total, rows), triton.cdiv(size, columns)), launch, arguments)]

    if out.numel():
        TABLE.start(x.device, "all", calls)
    return out.to(gate_up.dtype)


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch on rows that fill the tile, and on some that do not."""
    for regime, launch in TABLE.on(arch):
        for dtype, size in (("bf16", 12288), ("fp32", 1001)):
            (call,) = calls_of(arch, regime, launch, swiglu, meta(33, 2 * size, dtype=dtype))
            yield Case(f"swiglu {dtype} {'x'.join(map(str, launch.tile))}", call)
