"""Part `autotune`: the fastest entries of the launch tables on this GPU, as they are written in them."""

import contextlib
import io
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch

from dkv.bench.gpu.cases import Sizes
from dkv.bench.gpu.lab import TITLES, Lab
from dkv.bench.gpu.operations import OPERATIONS, choose_fused
from dkv.bench.gpu.report import Report
from dkv.bench.gpu.tools import variable
from dkv.bench.timing import synchronise

# Slots of a step: those of each regime of the tables, the most used ones first.
ACTIVE = (32, 4, 64, 256, 1024)


@torch.no_grad()
def run(report: Report, lab: Lab) -> None:
    """Search the launches of every operation until the time is over.

    Where several processes share the part, each only compiles its share of the candidates: Triton keeps what it has
    compiled on the disk, for the process that times all of them.
    """
    report.begin("autotune", "the fastest launches, as entries of the launch tables")
    if not lab.gpu:
        report.left_out.append("everything: launches are timed on a GPU alone")
    else:
        part, processes = report.share
        report.share = (0, 1)
        for name, item in report.items(items(lab)):
            found = report.attempt(name, lab.device, partial(item, (part, processes) if processes > 1 else None))
            if processes == 1 and found:
                report.row(f"{name}\n{found['told']}", {"name": name, **found})
    report.end()


def items(lab: Lab) -> Iterator[tuple[str, Callable[[tuple[int, int] | None], dict[str, Any] | None]]]:
    """By name, searches of launches as functions of a share of the candidates."""
    for family, spec in lab.specs.items():
        for active in ACTIVE:
            z = Sizes(spec, 1, max(ACTIVE), active, lab.dtype)
            for operation, make in (
                OPERATIONS | {"choose_token_fused int8": partial(choose_fused, eight=True)}
            ).items():
                yield f"{operation} {TITLES[family]} N{active}", partial(search, lab, partial(make, z, lab.device))


def search(lab: Lab, make: Callable[[], Any], share: tuple[int, int] | None) -> dict[str, Any] | None:
    """What a search says of the launches of an operation; None where none was made, as it was made before."""
    from dkv.kernels.dev import autotune

    said, whole = io.StringIO(), autotune.search
    with variable("DKV_AUTOTUNE", "1"), contextlib.redirect_stderr(said):
        autotune.search = partial(whole, timer=quick_ms) if share is None else partial(compile_share, share)
        try:
            make().run_by(lab.backends[0])
            synchronise(lab.device)
        finally:
            autotune.search = whole
    return {"told": said.getvalue().rstrip()} if said.getvalue() else None


def quick_ms(run: Callable[[], None]) -> float:
    """A fifth of the time that a search takes by itself, for there are hundreds of candidates."""
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=20, return_mode="median")


def compile_share(
    share: tuple[int, int], table: Any, arch: str, regime: Hashable, call: Callable[[Any], None], *_: Any
) -> Any:
    """In place of a search: compile every n-th candidate by running it; returns the present entry."""
    (part, processes), present = share, table.launch(arch, regime)
    for launch in list(dict.fromkeys((present, *table.candidates)))[part::processes]:
        # Candidates that do not compile or fit are told of by the search.
        with contextlib.suppress(Exception):
            call(launch)
    return present
