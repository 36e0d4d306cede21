"""The change of hidden states, and their store, eager, one row of states after the other: what is right."""

from torch import Tensor

from dkv.kernels.common.dtypes import wide

# Added to the length of what was kept: slots of which nothing was kept yet have changed most.
EPS = 1e-6


def row_change(x, delta: Tensor | None, kept, positions, rows) -> Tensor:
    change = wide(x).new_empty(len(x))
    for i, (row, slot) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        new, old = wide(x[i] if delta is None else x[i] + delta[i]), wide(kept[row, slot])
        change[i] = (new - old).abs().mean() / (old.square().mean().sqrt() + EPS)
    return change


def keep_rows_(x, delta: Tensor | None, kept, positions, rows, entries: Tensor | None) -> Tensor:
    out = x.new_empty(len(positions), x.shape[1])
    for i, (row, slot) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        entry = i if entries is None else int(entries[i])
        out[i] = x[entry] if delta is None else x[entry] + delta[entry]
        kept[row, slot] = out[i]
    return out
