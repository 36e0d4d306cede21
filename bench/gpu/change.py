"""Hidden states that are compared with those that were kept, and kept: see `dkv.bench.gpu.operations`."""

import torch
from torch import Tensor

from dkv import kernels
from dkv.bench.gpu.cases import Case, Inputs, Sizes, distinct, nbytes, randn, tolerance


def _states(z: Sizes, device: torch.device) -> Inputs:
    """Hidden states of `active` slots of every row, what is added to them, and what was kept of all slots."""
    size, total = z.spec.hidden_size, z.batch * z.active
    x, delta, kept = (randn(device, *n, size, dtype=z.dtype) for n in ((total,), (total,), (z.batch, z.slots)))
    rows = torch.arange(z.batch, device=device).repeat_interleave(z.active)
    positions = distinct(device, z.batch, z.active, z.slots).flatten()
    return {"x": x, "kept": kept, "positions": positions, "rows": rows, "delta": delta}


def change(z: Sizes, device: torch.device) -> Case:
    """How far hidden states are from those that were kept."""
    inputs = _states(z, device)

    def plain(x: Inputs) -> Tensor:
        new, old = (x["x"] + x["delta"]).float(), x["kept"][x["rows"], x["positions"]].float()
        return (new - old).abs().mean(-1) / (old.square().mean(-1).sqrt() + 1e-6)

    # Of what was kept only these slots are read. The sum is rounded before it is compared, which float64 does not do.
    read = [inputs[name] for name in ("x", "x", "delta", "positions", "rows")]
    return Case(
        "row_change",
        {"T": len(inputs["x"]), "d": z.spec.hidden_size},
        inputs,
        lambda x: kernels.row_change(**x, validate=False),
        tolerance(z.dtype, 4),
        nbytes(*read) + 4 * len(inputs["x"]),
        others={"eager": plain},
    )


def keep(z: Sizes, device: torch.device) -> Case:
    """Half of the entries go on, and are kept."""
    inputs = _states(z, device)
    entries = torch.arange(0, len(inputs["x"]), 2, device=device)
    inputs |= {"entries": entries, **{name: inputs[name][entries] for name in ("positions", "rows")}}

    def plain(x: Inputs) -> Tensor:
        found = (x["x"] + x["delta"])[x["entries"]]
        x["kept"][x["rows"], x["positions"]] = found
        return found

    return Case(
        "keep_rows_",
        {"T": len(entries), "d": z.spec.hidden_size},
        inputs,
        lambda x: kernels.keep_rows_(**x, validate=False),
        tolerance(z.dtype, 2),
        # Two are read for each that goes on, and two written.
        nbytes(entries, inputs["positions"], inputs["rows"]) + 4 * nbytes(inputs["x"][: len(entries)]),
        others={"eager": plain},
        written=("kept",),
    )
