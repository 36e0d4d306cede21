"""Head norms, rotation and the write into the buffer, in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.common.arguments import computable, constants, strided, unit_stride
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, calls_of, meta
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


def rope_scatter_(q, k, v, cos, sin, positions, k_buf, v_buf, query_positions, q_norm, k_norm):
    (batch, query_tokens, heads, size), (tokens, kv_heads) = q.shape, k.shape[1:3]
    # Only numbers that are stored need care in the interpreter: a load is made float32 at once.
    keys, values, out = computable(k_buf), computable(v_buf), computable(q.new_empty(q.shape))
    tensors = {name: unit_stride(x) for name, x in {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}.items()}
    tensors |= {"positions": positions, "query_positions": positions if query_positions is None else query_positions}
    arguments = {name: strided(x) for name, x in (tensors | {"k_buf": keys, "v_buf": values}).items()}
    for name, (gain, eps) in (("q_norm", q_norm), ("k_norm", k_norm)):
        arguments[name] = Norm(None if gain is None else gain.contiguous(), float(eps))
    arguments |= {"out": out, "query_tokens": query_tokens, "tokens": tokens}
    known = {"HQ": heads, "HKV": kv_heads, "D": size, "BLOCK_H": triton.next_power_of_2(size // 2)}

    def calls(launch: Launch) -> list[Call]:
        (entries,) = launch.tile
        tiles = triton.cdiv(query_tokens * heads, entries) + 2 * triton.cdiv(tokens * kv_heads, entries)
        sizes = {"C": constants(**known, ENTRIES=entries)}
        return [Call(rope_scatter_kernel, (tiles, batch), launch, arguments | sizes)]

    if q.numel() or k.numel():
        TABLE.start(q.device, min(max(SIZES[0], triton.next_power_of_2(size)), SIZES[-1]), calls)
    for buffer, written in ((k_buf, keys), (v_buf, values)):
        if written is not buffer:
            buffer.copy_(written)
    return out.to(q.dtype)


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch with nothing optional and with everything, and a head size that is no power of two."""
    for regime, launch in TABLE.on(arch):
        odd = regime - 16 if regime > 32 else 24
        for dtype, full, size in (("bf16", False, regime), ("bf16", True, regime), ("fp32", True, odd)):
            q, kv, buffer = (meta(2, n, h, size, dtype=dtype) for n, h in ((33, 28), (33, 4), (1001, 4)))
            table, places = meta(1001, size // 2, dtype=torch.float32), meta(2, 33, dtype=torch.int64)
            norm = Norm(meta(size, dtype=dtype), 1e-6) if full else Norm()
            given = (q, kv, kv, table, table, places, buffer, buffer, places if full else None, norm, norm)
            (call,) = calls_of(arch, regime, launch, rope_scatter_, *given)
            kind = "full" if full else "plain"
            yield Case(f"rope_scatter_ {dtype} D{size} {kind} {launch.tile[0]} entries", call)
