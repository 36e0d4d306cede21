"""The most confident tokens go into the canvas, in Triton: an entry counts those that come before it."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dkv.kernels import torch_backend
from dkv.kernels.triton_backend.cases import Case
from dkv.kernels.triton_backend.launch import Launch, LaunchTable, strides


@triton.jit
def _confidence(confidence, i, inside, stride):
    """Confidences in float32, NaN as the lowest of all."""
    value = tl.load(confidence + i.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _commit_kernel(
    canvas, token, confidence, eligible, count, positions, committed, threshold, entries,
    stride_cb, stride_cs, stride_tb, stride_tn, stride_fb, stride_fn, stride_eb, stride_en, stride_nb,
    stride_pb, stride_pn, OWN: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """One tile of entries against all of their row; grid (tiles of entries, B). The canvas is never read."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    inside = i < entries
    confidence += row * stride_fb
    eligible += row * stride_eb
    own = _confidence(confidence, i, inside, stride_fn)  # [I]
    rank = tl.zeros((OWN,), tl.int32)
    for first in tl.range(0, entries, OTHERS, num_stages=1):
        j = first + tl.arange(0, OTHERS)
        other = _confidence(confidence, j, j < entries, stride_fn)  # [J]
        open_ = tl.load(eligible + j.to(tl.int64) * stride_en, mask=j < entries, other=0) != 0
        above = other[None, :] > own[:, None]  # [I, J]
        level = (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum(((above | level) & open_[None, :]).to(tl.int32), 1)
    chosen = rank < tl.load(count + row * stride_nb)
    if threshold is not None:
        chosen = chosen | (own >= threshold)
    own_at = i.to(tl.int64)
    chosen = chosen & (tl.load(eligible + own_at * stride_en, mask=inside, other=0) != 0)
    tl.store(committed + row * entries + own_at, chosen, mask=inside)
    slot = own_at
    if positions is not None:
        slot = tl.load(positions + row * stride_pb + own_at * stride_pn, mask=chosen, other=0)
    value = tl.load(token + row * stride_tb + own_at * stride_tn, mask=chosen, other=0)
    tl.store(canvas + row * stride_cb + slot * stride_cs, value, mask=chosen)


# Tile: (entries that are ranked, entries they are compared with at a time). One regime: all.
TABLE = LaunchTable(
    "commit_",
    {"default": {"all": Launch((16, 256), 4)}, "interpreter": {"all": Launch((128, 128), 4)}},
    candidates=tuple(
        Launch(tile, warps) for tile in ((8, 256), (16, 128), (16, 256), (32, 256)) for warps in (2, 4, 8)
    ),
)


def commit_(canvas, token, log_confidence, eligible, count, *, positions=None, threshold=None, row=None):
    """`dkv.kernels.commit_`; `row` fixes the launch."""
    if log_confidence.dtype == torch.float64:
        return torch_backend.commit_(
            canvas, token, log_confidence, eligible, count, positions=positions, threshold=threshold
        )
    batch, entries = eligible.shape
    committed = torch.empty(eligible.shape, dtype=torch.bool, device=eligible.device)
    threshold = None if threshold is None else float(threshold)  # an integer would be compiled in

    def run(row: Launch) -> None:
        own, others = row.tile
        _commit_kernel[(triton.cdiv(entries, own), batch)](
            canvas, token, log_confidence, eligible, count, positions, committed, threshold, entries,
            *canvas.stride(), *token.stride(), *log_confidence.stride(), *eligible.stride(), *count.stride(),
            *strides(positions, 2), OWN=own, OTHERS=others, num_warps=row.warps,
        )  # fmt: skip

    if eligible.numel():
        TABLE.start(canvas.device, "all", run, row)
    return committed


def audit_cases(arch: str) -> Iterator[Case]:
    """The row with nothing optional, and with everything."""
    for _, row in TABLE.on(arch):
        for full in (False, True):
            constants = {"OWN": row.tile[0], "OTHERS": row.tile[1], "stride_nb": 1}
            constants |= dict.fromkeys(("stride_cs", "stride_tn", "stride_fn", "stride_en", "stride_pn"), 1)
            arguments = {
                "canvas": "*i64", "token": "*i64", "confidence": "*fp32", "eligible": "*i1", "count": "*i64",
                "committed": "*i1",
            }  # fmt: skip
            aligned = tuple(arguments)
            if full:
                arguments |= {"positions": "*i64", "threshold": "fp32"}
                aligned += ("positions",)
            else:
                constants |= {"positions": None, "threshold": None}
            numbers = ("entries", "stride_cb", "stride_tb", "stride_fb", "stride_eb", "stride_pb")
            arguments |= dict.fromkeys(numbers, "i32")
            name = f"commit_ {'full' if full else 'plain'} {'x'.join(map(str, row.tile))}"
            yield Case(name, _commit_kernel, row, arguments, constants, aligned)
