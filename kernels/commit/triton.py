"""The commit of a step in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.commit import torch as fallback
from dkv.kernels.commit.kernel import commit_kernel
from dkv.kernels.common.arguments import strided
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, calls_of, meta

# Tile: (entries that are ranked, entries they are compared with at a time). One regime: all. None has been timed on a
# GPU; `dkv audit` finds no spilled registers.
TABLE = LaunchTable(
    "commit_",
    {"default": {"all": Launch((16, 256), 4)}, "interpreter": {"all": Launch((128, 128), 4)}},
    [Launch(tile, warps) for tile in ((8, 256), (16, 128), (16, 256), (32, 256)) for warps in (2, 4, 8)],
)


def commit_(canvas, token, log_confidence, eligible, count, positions):
    if log_confidence.dtype == torch.float64:
        return fallback.commit_(canvas, token, log_confidence, eligible, count, positions)
    batch, entries = eligible.shape
    committed = torch.empty(eligible.shape, dtype=torch.bool, device=eligible.device)
    tensors = {"canvas": canvas, "token": token, "confidence": log_confidence, "eligible": eligible, "count": count}
    tensors = {name: strided(x) for name, x in (tensors | {"positions": positions}).items()}

    def calls(launch: Launch) -> list[Call]:
        own, others = launch.tile
        arguments = {"committed": committed, "entries": entries, "OWN": own, "OTHERS": others}
        return [Call(commit_kernel, (triton.cdiv(entries, own), batch), launch, tensors | arguments)]

    if eligible.numel():
        TABLE.start(canvas.device, "all", calls)
    return committed


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch, on the whole canvas and on some positions of it."""
    for regime, launch in TABLE.on(arch):
        for kind, entries in (("whole", 1001), ("positions", 65)):
            longs, chosen = meta(2, entries, dtype=torch.int64), meta(2, entries, dtype=torch.bool)
            canvas, count = meta(2, 1001, dtype=torch.int64), meta(2, dtype=torch.int64)
            given = (canvas, longs, meta(2, entries, dtype=torch.float32), chosen, count)
            positions = longs if kind == "positions" else None
            (call,) = calls_of(arch, regime, launch, commit_, *given, positions)
            yield Case(f"commit_ {kind} {'x'.join(map(str, launch.tile))}", call)
