"""The commit of a step in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.commit import torch as fallback
from dkv.kernels.commit.kernel import commit_kernel
from dkv.kernels.commit.launch import TABLE
from dkv.kernels.common.launch import Call, Launch, strides
from dkv.kernels.dev.cases import Case, calls_of, case, meta


def commit_(canvas, token, log_confidence, eligible, count, positions=None, *, launch: Launch | None = None):
    """`dkv.kernels.commit_`; `launch` is used in place of the table's."""
    if log_confidence.dtype == torch.float64:
        return fallback.commit_(canvas, token, log_confidence, eligible, count, positions)
    batch, entries = eligible.shape
    committed = torch.empty(eligible.shape, dtype=torch.bool, device=eligible.device)

    def calls(launch: Launch) -> list[Call]:
        own, others = launch.tile
        arguments = {
            "canvas": canvas, "token": token, "confidence": log_confidence, "eligible": eligible, "count": count,
            "positions": positions, "committed": committed, "entries": entries, "OWN": own, "OTHERS": others,
        }  # fmt: skip
        arguments |= strides(
            c=(canvas, "bs"), t=(token, "bn"), f=(log_confidence, "bn"), e=(eligible, "bn"), n=(count, "b"),
            p=(positions, "bn"),
        )  # fmt: skip
        return [Call(commit_kernel, (triton.cdiv(entries, own), batch), launch, arguments)]

    if eligible.numel():
        TABLE.start(canvas.device, "all", calls, launch)
    return committed


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch, on the whole canvas and on some positions of it."""
    for regime, launch in TABLE.on(arch):
        for kind in ("whole", "positions"):
            entries = 1001 if kind == "whole" else 65
            longs = meta(2, entries, dtype=torch.int64)
            given = (longs, meta(2, entries, dtype=torch.float32), meta(2, entries, dtype=torch.bool))
            count, canvas = meta(2, dtype=torch.int64), meta(2, 1001, dtype=torch.int64)
            positions = longs if kind == "positions" else None
            (call,) = calls_of(arch, regime, launch, lambda: commit_(canvas, *given, count, positions, launch=launch))  # noqa: B023
            yield case(f"commit_ {kind} {'x'.join(map(str, launch.tile))}", call)
