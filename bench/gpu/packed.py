"""The operations on packed rows of different lengths, between half of the active slots and all of them."""

from dataclasses import replace

import torch
from torch import Tensor

from dkv.bench.baselines import operations as eager
from dkv.bench.gpu import operations as table
from dkv.bench.gpu.cases import Case, Inputs, Sizes, nbytes


def _counts(z: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many of the active slots are of each row, int64 [B], and which, bool [B, N]."""
    counts = [z.active - z.active // 2 * i // max(z.batch - 1, 1) for i in range(z.batch)]
    lengths = torch.tensor(counts, device=device)
    return lengths, torch.arange(z.active, device=device) < lengths[:, None]


def attention(z: Sizes, device: torch.device) -> Case:
    """Attention of rows that end between half of the slots and all; eager fills the rows up, and takes that out."""
    dense, (lengths, own) = table.attention(z, device, ragged=True), _counts(z, device)
    q, ranges, entry = dense.inputs["q"], dense.inputs["key_ranges"], own.flatten().nonzero().squeeze(1)
    rows = {"query_starts": lengths.cumsum(0) - lengths, "query_lengths": lengths, "most_queries": z.active}
    inputs = dense.inputs | rows | {"q": q[own]}

    def padded(x: Inputs) -> Tensor:
        filled = torch.zeros_like(q).flatten(0, 1).index_copy_(0, entry, x["q"]).view_as(q)
        slot = torch.arange(z.slots, device=device)
        visible = (slot < ranges[:, 1:]).unsqueeze(1)
        return eager.attention(filled, x["k"], x["v"], visible).flatten(0, 1).index_select(0, entry)

    return replace(
        dense,
        inputs=inputs,
        bytes=dense.bytes + 2 * (nbytes(inputs["q"]) - nbytes(q)),
        flops=4 * int((lengths * ranges[:, 1]).sum()) * q.shape[2] * q.shape[3],
        others={"eager": padded},
    )


def rope_scatter(z: Sizes, device: torch.device) -> Case:
    """Rotation and writes of the active slots of all rows."""
    dense, (lengths, own) = table.rope_scatter(z, device), _counts(z, device)
    entries = {name: dense.inputs[name][own] for name in ("q", "k", "v", "positions")}
    rows = torch.arange(z.batch, device=device).repeat_interleave(lengths)
    saved = 2 * sum(nbytes(dense.inputs[name]) - nbytes(entries[name]) for name in "qkv")
    inputs = dense.inputs | entries | {"rows": rows}
    return replace(
        dense, inputs=inputs, bytes=dense.bytes - saved, flops=dense.flops * len(rows) // own.numel(), others={}
    )
