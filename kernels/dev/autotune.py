"""`DKV_AUTOTUNE=1`: time the candidates of a launch table on the GPU, and print the entry to check in."""

import sys
from collections.abc import Callable, Hashable

import torch
from triton.errors import TritonError
from triton.testing import do_bench

from dkv.kernels.common.launch import Launch, LaunchTable


def median_ms(run: Callable[[], None]) -> float:
    return do_bench(run, return_mode="median")


def search(
    table: LaunchTable,
    arch: str,
    regime: Hashable,
    run: Callable[[Launch], None],
    timer: Callable[[Callable[[], None]], float] = median_ms,
) -> Launch:
    """The fastest of the table's entry and its candidates by `timer`, in ms; those that do not run are left out.

    Tells on standard error what was measured, and the entry to paste into the table. If none runs, the error of the
    table's own entry is raised.
    """
    present, times, failed = table.launch(arch, regime), {}, {}
    for launch in dict.fromkeys((present, *table.candidates)):
        try:
            times[launch] = timer(lambda launch=launch: run(launch))
        except (TritonError, RuntimeError) as error:
            # After a fault on the device nothing that follows can be trusted.
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise
            failed[launch] = error
    if not times:
        raise failed[present]
    best = min(times, key=times.__getitem__)
    lines = [f"{table.name} on {arch}, {code(regime)}: {len(times)} entries timed, {len(failed)} do not run"]
    for launch in sorted(times, key=times.__getitem__):
        lines.append(f"  {times[launch]:9.4f} ms  {code(launch)}{'  the present entry' if launch == present else ''}")
    lines.append(f'"{arch}": {{{code(regime)}: {code(best)}}},')
    print("\n".join(lines), file=sys.stderr, flush=True)
    return best


def code(x: Hashable) -> str:
    """A launch or a regime as it is written in a table."""
    if isinstance(x, Launch):
        return f"Launch({x.tile}, {x.warps}{f', {x.stages}' if x.stages != 1 else ''})"
    return repr(x).replace("'", '"')
