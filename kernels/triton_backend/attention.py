"""Attention of the active queries over the buffer, in Triton.

The query heads of one key head are packed into the rows of a tile: row r of key head h is token
r // GROUP, query head h * GROUP + r % GROUP. Where queries are few, the keys are divided among
several programs, and a second kernel merges their partial results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dkv.kernels import torch_backend
from dkv.kernels.triton_backend.attention_table import TABLE
from dkv.kernels.triton_backend.cases import Case, case
from dkv.kernels.triton_backend.launch import Launch, computable, power_of_two, precision, splits, strides, unit_stride
from dkv.kernels.workspace import Workspace

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(at, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, 0 where a mask that applies does not hold; no predicates for one that does not apply."""
    if ROWS and COLUMNS:
        tile = tl.load(at, mask=rows & columns, other=0.0)
    elif ROWS:
        tile = tl.load(at, mask=rows, other=0.0)
    elif COLUMNS:
        tile = tl.load(at, mask=columns, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _absorb(
    acc, top, total, q, k, v, key_mask, mask, mask_row, key_blocks, query_block, first, start, stop, scale,
    stride_ks, stride_vs, stride_km, stride_ms, stride_kb,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the slots `first` to `first + BLOCK_N - 1` to the running softmax of a tile of queries."""
    # Scalars carry the 64-bit part of an offset; within a tile 32 bits do, unless a stride is enormous.
    n, d, first = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.cast(first, tl.int64)
    if WIDE:
        n = n.to(tl.int64)
    seen = (n >= start - first) & (n < stop - first)  # [N]; on an edge alone not all true
    k_at = k + first * stride_ks + (n[None, :] * stride_ks + d[:, None])
    key = _load(k_at, seen[None, :], (d < D)[:, None], EDGE, D != BLOCK_D)  # [D, N]
    scores = tl.dot(q, key, input_precision=PRECISION) * scale  # [M, N]
    if mask is not None:
        mask_at = mask + first * stride_ms + (mask_row[:, None] + n[None, :] * stride_ms)
        allowed = tl.load(mask_at, mask=seen[None, :], other=0)
        scores = tl.where(allowed != 0, scores, float("-inf"))
    if key_blocks is not None:
        key_block = tl.load(key_blocks + first * stride_kb + n * stride_kb, mask=seen, other=0).to(tl.int32)
        scores = tl.where(key_block[None, :] <= query_block[:, None], scores, float("-inf"))
    if key_mask is not None:
        seen = seen & (tl.load(key_mask + first * stride_km + n * stride_km, mask=seen, other=0) != 0)
    if EDGE:
        scores = tl.where(seen[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))  # [M]
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight, keep = tl.exp2(scores - shift[:, None]), tl.exp2(top - shift)
    # What a hidden slot holds is not read: 0 times NaN is NaN.
    v_at = v + first * stride_vs + (n[:, None] * stride_vs + d[None, :])
    value = _load(v_at, seen[:, None], (d < D)[None, :], EDGE, D != BLOCK_D)  # [N, D]
    acc = tl.dot(weight.to(value.dtype), value, acc * keep[:, None], input_precision=PRECISION)
    return acc, highest, total * keep + tl.sum(weight, 1)


@triton.jit
def _attention_kernel(
    q, k, v, out, lse, lengths, ranges, key_mask, mask, query_blocks, key_blocks, scale, tokens, slots,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_lb, stride_rb, stride_re, stride_kmb, stride_kms, stride_mb, stride_mn, stride_ms,
    stride_qbb, stride_qbn, stride_kbb, stride_kbs,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TESTED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of packed queries over one part of the slots; grid (tiles of queries x SPLITS, Hkv, B)."""
    query_tile, split = tl.program_id(0) // SPLITS, (tl.program_id(0) % SPLITS).to(tl.int64)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m, d = query_tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, member = m // GROUP, m % GROUP  # [M]
    length = tokens
    if lengths is not None:
        length = tl.minimum(tokens, tl.load(lengths + row * stride_lb)).to(tl.int32)
    asked = token < length
    q += row * stride_qb + head * GROUP * stride_qh
    q_at = q + token.to(tl.int64)[:, None] * stride_qn + member.to(tl.int64)[:, None] * stride_qh + d[None, :]
    query = tl.load(q_at, mask=asked[:, None] & (d < D)[None, :], other=0.0)

    # The slots of this part that are in the range of the row.
    part = tl.cdiv(tl.cdiv(slots, BLOCK_N), SPLITS) * BLOCK_N
    start, stop = split * part, tl.minimum(slots, (split + 1) * part)
    if ranges is not None:
        start = tl.maximum(start, tl.load(ranges + row * stride_rb))
        stop = tl.minimum(stop, tl.load(ranges + row * stride_rb + stride_re))
    if query_tile * BLOCK_M >= length * GROUP:
        stop = start
    stop = tl.maximum(start, stop)
    k, v = k + row * stride_kb + head * stride_kh, v + row * stride_vb + head * stride_vh
    if key_mask is not None:
        key_mask += row * stride_kmb
    mask_row, query_block = m, m
    if mask is not None:
        first_token = query_tile * BLOCK_M // GROUP
        mask += row * stride_mb + first_token.to(tl.int64) * stride_mn
        mask_row = tl.where(asked, token - first_token, 0)
        mask_row = (mask_row.to(tl.int64) if WIDE else mask_row) * stride_mn
    if key_blocks is not None:
        query_blocks += row * stride_qbb + token.to(tl.int64) * stride_qbn
        query_block = tl.load(query_blocks, mask=asked, other=0).to(tl.int32)
        key_blocks += row * stride_kbb

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Whole tiles in a pipelined loop that does not test the range, then the one or two at its ends. Where
    # every tile is tested there is one loop, as one takes fewer registers than two.
    before, whole, after = start // BLOCK_N, tl.cdiv(start, BLOCK_N), stop // BLOCK_N
    first, last = (before, tl.cdiv(stop, BLOCK_N)) if TESTED else (whole, after)
    for tile in tl.range(first, last, num_stages=STAGES):
        acc, top, total = _absorb(
            acc, top, total, query, k, v, key_mask, mask, mask_row, key_blocks, query_block, tile * BLOCK_N, start,
            stop, scale, stride_ks, stride_vs, stride_kms, stride_ms, stride_kbs,
            D, BLOCK_D, BLOCK_N, TESTED, WIDE, PRECISION,
        )  # fmt: skip
    if not TESTED:
        has_tail = (after * BLOCK_N < stop) & ((after > before) | (whole == before))
        for end in tl.range(tl.where(before < whole, 0, 1), tl.where(has_tail, 2, 1), num_stages=1):
            acc, top, total = _absorb(
                acc, top, total, query, k, v, None, None, mask_row, None, query_block,
                tl.where(end == 0, before, after) * BLOCK_N, start, stop, scale, stride_ks, stride_vs, 0, 0, 0,
                D, BLOCK_D, BLOCK_N, True, WIDE, PRECISION,
            )  # fmt: skip

    # A query that sees nothing, or is not asked, gives 0 and -inf.
    total = tl.where(asked, total, 0.0)
    acc = tl.where(total[:, None] > 0, acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    log_total = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
    at = ((row * tokens + token) * tl.num_programs(1) * GROUP + head * GROUP + member) * SPLITS + split
    inside = token < tokens
    out_at = out + at[:, None] * D + d[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    if lse is not None:
        tl.store(lse + at, log_total, mask=inside)


@triton.jit
def _merge_kernel(
    part, part_lse, out, lse, rows, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """The outputs of the parts, weighted by their share of the softmax; grid (tiles of rows,)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    inside = r < rows
    own = tl.load(part_lse + r[:, None] * SPLITS + split[None, :], mask=inside[:, None], other=float("-inf"))  # [R, P]
    top = tl.max(own, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((own - shift[:, None]) * LOG2E)
    total = tl.sum(weight, 1)
    share = weight / tl.where(total > 0, total, 1.0)[:, None]
    at = (r[:, None, None] * SPLITS + split[None, :, None]) * D + d[None, None, :]
    value = tl.load(part + at, mask=inside[:, None, None] & (d < D)[None, None, :], other=0.0)  # [R, P, D]
    merged = tl.sum(value * share[:, :, None], 1).to(out.dtype.element_ty)
    tl.store(out + r[:, None] * D + d[None, :], merged, mask=inside[:, None] & (d < D)[None, :])
    if lse is not None:
        log_total = tl.where(total > 0, shift + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(lse + r, log_total, mask=inside)


LARGEST_HEAD = 256
MOST_PARTS = 16
MERGE_ROWS = 4


def cached_attention(
    q, k_buf, v_buf, *, query_lengths=None, key_ranges=None, key_mask=None, mask=None, block_ids=None, scale=None,
    return_lse=False, workspace=None, parts=None, row=None,
):  # fmt: skip
    """`dkv.kernels.cached_attention`; `parts` fixes in how many parts the slots are divided, `row` the launch.

    Heads of more than 256 numbers do not fit the registers: PyTorch attends with them.
    """
    (batch, tokens, heads, size), dtype = q.shape, q.dtype
    if size > LARGEST_HEAD:
        return torch_backend.cached_attention(
            q, k_buf, v_buf, query_lengths=query_lengths, key_ranges=key_ranges, key_mask=key_mask, mask=mask,
            block_ids=block_ids, scale=scale, return_lse=return_lse,
        )  # fmt: skip
    slots, kv_heads = k_buf.shape[1:3]
    q, k, v = (unit_stride(computable(x)) for x in (q, k_buf, v_buf))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    group, block_d = heads // kv_heads, max(16, power_of_two(size))
    packed, tested = tokens * group, _tested(q.element_size(), block_d, key_mask, mask, block_ids)
    query_blocks, key_blocks = (None, None) if block_ids is None else block_ids
    work = Workspace() if workspace is None else workspace

    def run(row: Launch) -> None:
        block_m, block_n = row.tile
        tiles = triton.cdiv(packed, block_m)
        most = min(MOST_PARTS, triton.cdiv(slots, block_n) // 2)
        split = splits(q.device, tiles * kv_heads * batch, batch, most) if parts is None else parts
        part = out if split == 1 else work.take("parts", (*q.shape[:3], split, size), torch.float32, q.device)
        part_lse = lse if split == 1 else work.take("parts lse", part.shape[:-1], torch.float32, q.device)
        _attention_kernel[(tiles * split, kv_heads, batch)](
            q, k, v, part, part_lse, query_lengths, key_ranges, key_mask, mask, query_blocks, key_blocks,
            (size**-0.5 if scale is None else scale) * LOG2E.value, tokens, slots,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides(query_lengths, 1), *strides(key_ranges, 2),
            *strides(key_mask, 2), *strides(mask, 3), *strides(query_blocks, 2), *strides(key_blocks, 2),
            GROUP=group, D=size, SPLITS=split, TESTED=tested, BLOCK_D=block_d,
            PRECISION=precision(q) if _multiplies_tf32(block_d, rules == "masked") else "ieee",
            WIDE=_wide(row, k, v, key_mask, mask, key_blocks), BLOCK_M=block_m, BLOCK_N=block_n, STAGES=row.stages,
            num_warps=row.warps, num_stages=row.stages,
        )  # fmt: skip
        if split > 1:
            rows = batch * tokens * heads
            _merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
                part, part_lse, out, lse, rows, D=size, SPLITS=split, BLOCK_D=block_d, ROWS=MERGE_ROWS, num_warps=4
            )

    many = "few" if packed <= 16 else "some" if packed <= 64 else "many"
    rules = "plain" if key_mask is None and mask is None and block_ids is None else "masked"
    if out.numel():
        TABLE.start(q.device, (many, rules, q.element_size(), max(64, block_d)), run, row)
    out = out.to(dtype)
    return (out, lse) if return_lse else out


def _tested(width: int, block_d: int, *rules) -> bool:
    """Whether every tile is tested: where a rule asks for it, or two loops would not fit the registers."""
    return any(rule is not None for rule in rules) or width * block_d > 512


def _multiplies_tf32(block_d: int, masked: bool) -> bool:
    """Whether the three TF32 products of a float32 one fit the registers."""
    return block_d <= (64 if masked else 128)


def _wide(row: Launch, *tensors: Tensor | None) -> bool:
    """Whether an offset within a tile may pass 32 bits."""
    return any(x is not None and 2 * max(x.stride()) * max(row.tile) >= 2**31 for x in tensors)


def audit_cases(arch: str) -> list[Case]:
    """Every row with all that its regime allows and a head that does not fill the tile; what `arch` runs also bare."""
    cases = [
        _case(arch, regime, row, full)
        for regime, row in TABLE.on(arch)
        for full in (True, False)
        if full or row == TABLE.row(arch, regime)
    ]
    return cases + [_merge_case(size) for size in (64, 128, 256)]


_RULES = ("key_mask", "mask", "query_blocks", "key_blocks")


def _case(arch: str, regime: tuple, row: Launch, full: bool) -> Case:
    many, rules, width, size = regime
    split, tf32 = 1 if many == "many" and not full else 4, _multiplies_tf32(size, rules == "masked")
    given = {"q", "k", "v", "out", *(("lengths", "ranges", "lse") if full else ()), *(("lse",) if split > 1 else ())}
    given |= set(() if rules == "plain" else _RULES if full else _RULES[:1])
    number = "bf16" if width == 2 else "fp32"
    pointers = dict.fromkeys(("q", "k", "v"), f"*{number}") | {"out": f"*{number if split == 1 else 'fp32'}"}
    pointers |= {"lse": "*fp32", "lengths": "*i64", "ranges": "*i64", "key_mask": "*i1", "mask": "*i1"}
    pointers |= {"query_blocks": "*i64", "key_blocks": "*i64"}
    constants = dict.fromkeys(set(pointers) - given) | {
        "GROUP": 7 if full else 1, "D": size - 16 if full else size, "SPLITS": split, "WIDE": False,
        "TESTED": rules == "masked" or width * size > 512, "BLOCK_D": size, "BLOCK_M": row.tile[0],
        "BLOCK_N": row.tile[1], "STAGES": row.stages,
        "PRECISION": "tf32x3" if width == 4 and arch.startswith("sm") and tf32 else "ieee",
    }  # fmt: skip
    dense = {f"stride_{x}" for x in ("qb", "qn", "qh", "kb", "ks", "kh", "vb", "vs", "vh")}
    expect = {
        "tensor core": width == 2 or tf32,
        "wgmma": width == 2 and row.tile[0] >= 64,
        "async copy": row.stages > 1,
    }
    return case(
        f"{many} {rules} {number} D{constants['D']} {row.tile[0]}x{row.tile[1]}", _attention_kernel, row,
        {n: kind for n, kind in pointers.items() if n in given} | {"scale": "fp32"}, constants,
        loose=tuple(n for n in _attention_kernel.arg_names if n.startswith("stride_") and n not in dense),
        expect=tuple(family for family, there in expect.items() if there),
    )  # fmt: skip


def _merge_case(size: int) -> Case:
    constants = {"D": size, "SPLITS": MOST_PARTS, "BLOCK_D": size, "ROWS": MERGE_ROWS}
    types = {"part": "*fp32", "part_lse": "*fp32", "out": "*bf16", "lse": "*fp32"}
    return case(f"merge D{size}", _merge_kernel, Launch((MERGE_ROWS,), 4), types, constants)
