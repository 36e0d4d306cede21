"""Head norms, rotation and the write into the buffer, in Triton."""

from collections.abc import Iterator

import torch
import triton

from dkv.kernels.common.launch import Call, Launch, computable, power_of_two, strides, unit_stride
from dkv.kernels.dev.cases import Case, calls_of, case, meta
from dkv.kernels.rope_scatter.kernel import rope_scatter_kernel
from dkv.kernels.rope_scatter.launch import SIZES, TABLE


def rope_scatter_(
    q, k, v, cos, sin, positions, k_buf, v_buf, query_positions=None, q_norm=None, k_norm=None,
    *, launch: Launch | None = None,
):  # fmt: skip
    """`dkv.kernels.rope_scatter_`; `launch` is used in place of the table's."""
    (batch, query_tokens, heads, size), (tokens, kv_heads) = q.shape, k.shape[1:3]
    (q_gain, q_eps), (k_gain, k_eps) = q_norm or (None, 0.0), k_norm or (None, 0.0)
    # Only numbers that are stored need care in the interpreter: a load is made float32 at once.
    keys, values, out = computable(k_buf), computable(v_buf), computable(q.new_empty(q.shape))
    query_positions = positions if query_positions is None else query_positions
    q, k, v, cos, sin = (unit_stride(x) for x in (q, k, v, cos, sin))
    q_gain, k_gain = (x if x is None else x.contiguous() for x in (q_gain, k_gain))

    def calls(launch: Launch) -> list[Call]:
        (rows,) = launch.tile
        tiles = triton.cdiv(query_tokens * heads, rows) + 2 * triton.cdiv(tokens * kv_heads, rows)
        arguments = {
            "q": q, "k": k, "v": v, "cos": cos, "sin": sin, "positions": positions, "query_positions": query_positions,
            "k_buf": keys, "v_buf": values, "out": out, "q_gain": q_gain, "k_gain": k_gain, "q_eps": float(q_eps),
            "k_eps": float(k_eps), "query_tokens": query_tokens, "tokens": tokens,
            "HQ": heads, "HKV": kv_heads, "D": size, "BLOCK_H": power_of_two(size // 2), "ROWS": rows,
        }  # fmt: skip
        arguments |= strides(
            q=(q, "bnh"), k=(k, "bnh"), v=(v, "bnh"), c=(cos, "p"), s=(sin, "p"), p=(positions, "bn"),
            qp=(query_positions, "bn"), kb=(keys, "bshd"), vb=(values, "bshd"),
        )  # fmt: skip
        return [Call(rope_scatter_kernel, (tiles, batch), launch, arguments)]

    if q.numel() or k.numel():
        TABLE.start(q.device, min(max(SIZES[0], power_of_two(size)), SIZES[-1]), calls, launch)
    for buffer, written in ((k_buf, keys), (v_buf, values)):
        if written is not buffer:
            buffer.copy_(written)
    return out.to(q.dtype)


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch with nothing optional and with everything, and a head size that is no power of two."""
    for size, launch in TABLE.on(arch):
        for dtype, full, head_size in (
            (torch.bfloat16, False, size), (torch.bfloat16, True, size),
            (torch.float32, True, size - 16 if size > 32 else 24),
        ):  # fmt: skip
            tokens = 33
            q, kv = meta(2, tokens, 28, head_size, dtype=dtype), meta(2, tokens, 4, head_size, dtype=dtype)
            table = meta(1001, head_size // 2, dtype=torch.float32)
            buffer, places = meta(2, 1001, 4, head_size, dtype=dtype), meta(2, tokens, dtype=torch.int64)
            optional = (places, *[(meta(head_size, dtype=dtype), 1e-6)] * 2) if full else ()
            given = (q, kv, kv, table, table, places, buffer, buffer, *optional)
            (call,) = calls_of(arch, size, launch, lambda: rope_scatter_(*given, launch=launch))  # noqa: B023
            number = "bf16" if dtype == torch.bfloat16 else "fp32"
            kind = "full" if full else "plain"
            yield case(f"rope_scatter_ {number} D{head_size} {kind} {launch.tile[0]} rows", call)
