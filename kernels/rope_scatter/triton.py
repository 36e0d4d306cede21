"""Head norms, rotation and the write into the buffer, in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.common.arguments import computable, constants, restored, strided, strided_alone, unit_stride
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.common.stored import Stored
from dkv.kernels.dev.cases import Case, buffer, calls_of, meta
from dkv.kernels.rope_scatter.kernel import rope_scatter_kernel
from dkv.kernels.rope_scatter.reference import Norm

# Tile: (heads of tokens,). Regime: head size up to. 1024 numbers to a program keep the accesses of 2-byte numbers
# 128 bits wide, and leave enough programs to fill a GPU when few tokens are active. None has been timed on a GPU;
# `dkv audit` finds no spilled registers.
SIZES = (32, 64, 128, 256)
TABLE = LaunchTable(
    "rope_scatter_",
    {
        "default": {size: Launch((1024 // size,), 2) for size in SIZES},
        "interpreter": {size: Launch((256,), 2) for size in SIZES},
    },
    [Launch((entries,), warps) for entries in (4, 8, 16, 32) for warps in (1, 2, 4)],
)


def rope_scatter_(q, k, v, cos, sin, positions, k_buf, v_buf, rows, query_positions, q_norm, k_norm):
    # Only numbers that are stored need care in the interpreter: a load is made float32 at once.
    kept, out = [*_writable(k_buf), *_writable(v_buf)], computable(q.new_empty(q.shape))
    if q.numel() or k.numel():
        read = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(cos), unit_stride(sin)
        places = positions if query_positions is None else query_positions
        index = unit_stride(positions), unit_stride(places), None if rows is None else rows.contiguous()
        gains = [None if norm.gain is None else norm.gain.contiguous() for norm in (q_norm, k_norm)]
        TABLE.start(_plan, (*read, *index, *kept, out, *gains), float(q_norm.eps), float(k_norm.eps))
    for held, written in zip((*k_buf, *v_buf), kept, strict=True):
        if written is not held:
            held.copy_(written)
    return restored(out, q.dtype)


def _writable(x: Stored) -> Stored:
    # Scales are rounded in the kernel, as they say how numbers are.
    return Stored(computable(x.numbers), x.scales)


def _plan(q, k, v, cos, sin, positions, query_positions, rows, *others):
    *kept, out, q_gain, k_gain, q_eps, k_eps = others
    # Packed entries are of one row, as far as they are read.
    batch = len(q) if rows is None else 1
    (query_tokens, heads, size), (tokens, kv_heads) = q.shape[-3:], k.shape[-3:-1]
    arguments = {"cos": strided(cos), "sin": strided(sin)}
    arguments |= {"k_buf": Stored(*map(strided, kept[:2])), "v_buf": Stored(*map(strided, kept[2:]))}
    read = strided if rows is None else strided_alone
    arguments |= {"q": read(q), "k": read(k), "v": read(v)}
    arguments |= {"positions": positions, "positions_stride": positions.stride(0), "rows": rows}
    arguments |= {"query_positions": query_positions, "query_positions_stride": query_positions.stride(0)}
    arguments |= {"q_norm": Norm(q_gain, q_eps), "k_norm": Norm(k_gain, k_eps)}
    arguments |= {"out": out, "query_tokens": query_tokens, "tokens": tokens}
    known = {"HQ": heads, "HKV": kv_heads, "D": size, "W": cos.shape[1]}
    known["BLOCK_H"] = triton.next_power_of_2(size // 2)

    def calls(launch: Launch) -> list[Call]:
        (entries,) = launch.tile
        tiles = triton.cdiv(query_tokens * heads, entries) + 2 * triton.cdiv(tokens * kv_heads, entries)
        sizes = {"C": constants(**known, ENTRIES=entries)}
        return [Call(rope_scatter_kernel, (tiles, batch), launch, arguments | sizes)]

    return min(max(SIZES[0], triton.next_power_of_2(size)), SIZES[-1]), calls


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch with nothing optional, and packed with everything; a head size that is no power of two; and, of
    what `arch` uses, heads of which a part is rotated, and buffers in 8 bits."""
    for regime, launch in TABLE.on(arch):
        odd = regime - 16 if regime > 32 else 24
        kinds = [("bf16", "plain", regime), ("bf16", "full", regime), ("fp32", "full", odd)]
        if launch == TABLE.launch(arch, regime):
            kinds += [("bf16", "full part", regime), ("bf16", "full int8", regime), ("fp32", "full int8", odd)]
        for dtype, kind, size in kinds:
            full, part = kind != "plain", 2 if kind.endswith("part") else 1
            entries = (33,) if full else (2, 33)
            q, kv = (meta(*entries, heads, size, dtype=dtype) for heads in (28, 4))
            kept = buffer(2, 1001, 4, size, dtype=dtype, bits=kind.endswith("int8"))
            table, places = meta(1001, size // 2 // part, dtype=torch.float32), meta(*entries, dtype=torch.int64)
            rows = places if full else None
            norm = Norm(meta(size, dtype=dtype), 1e-6) if full else Norm()
            given = (q, kv, kv, table, table, places, kept, kept, rows, rows, norm, norm)
            (call,) = calls_of(arch, regime, launch, rope_scatter_, *given)
            yield Case(f"rope_scatter_ {dtype} D{size} {kind} {launch.tile[0]} entries", call)
