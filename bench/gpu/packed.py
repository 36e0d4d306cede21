"""The operations on packed rows of different lengths, between half of the active slots and all of them."""

from dataclasses import replace

import torch
from torch import Tensor

from dkv.bench.baselines import operations as eager
from dkv.bench.gpu import operations as table
from dkv.bench.gpu.cases import Case, Inputs, Sizes, counts, nbytes
from dkv.bench.gpu.ways import seen


def attention(z: Sizes, device: torch.device, gap: bool = False, block: int = 0) -> Case:
    """Attention of rows that end between half of the slots and all; eager fills the rows up, and takes that out.

    block: the queries stand in the last slots that a row may have, and see those of their block of so many slots and
        of the blocks before it; there are no other ways then.
    """
    dense, (lengths, own) = table.attention(z, device, ragged=True, gap=gap), counts(z, device, z.active)
    q, visible, entry = dense.inputs["q"], seen(dense.inputs), own.flatten().nonzero().squeeze(1)
    rows = {"query_starts": lengths.cumsum(0) - lengths, "query_lengths": lengths, "most_queries": z.active}
    inputs = dense.inputs | rows | {"q": q[own]}
    if block:
        place = torch.arange(z.slots - z.active, z.slots, device=device).expand(z.batch, -1)[own]
        inputs["query_ends"] = (place // block + 1) * block

    def padded(x: Inputs) -> Tensor:
        filled = torch.zeros_like(q).flatten(0, 1).index_copy_(0, entry, x["q"]).view_as(q)
        return eager.attention(filled, x["k"], x["v"], visible).flatten(0, 1).index_select(0, entry)

    return replace(
        dense,
        inputs=inputs,
        bytes=dense.bytes + 2 * (nbytes(inputs["q"]) - nbytes(q)),
        # With ends the most that it may be.
        flops=4 * int((lengths * visible.sum((1, 2))).sum()) * q.shape[2] * q.shape[3],
        others={} if block else {"eager": padded},
    )


def rope_scatter(z: Sizes, device: torch.device, part: int = 1) -> Case:
    """Rotation and writes of the active slots of all rows; of a head the first of `part` parts is rotated."""
    dense, (lengths, own) = table.rope_scatter(z, device), counts(z, device, z.active)
    entries = {name: dense.inputs[name][own] for name in ("q", "k", "v", "positions")}
    rows = torch.arange(z.batch, device=device).repeat_interleave(lengths)
    saved = 2 * sum(nbytes(dense.inputs[name]) - nbytes(entries[name]) for name in "qkv")
    inputs = dense.inputs | entries | {"rows": rows}
    inputs |= {name: inputs[name][:, : inputs[name].shape[1] // part] for name in ("cos", "sin")}
    return replace(
        dense, inputs=inputs, bytes=dense.bytes - saved, flops=dense.flops * len(rows) // own.numel(), others={}
    )
