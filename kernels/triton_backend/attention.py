"""Attention of the active queries over the buffer, in Triton; the kernels are in `attention_kernel`."""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from dkv.kernels import torch_backend
from dkv.kernels.triton_backend.attention_kernel import LOG2E, attention_kernel, merge_kernel
from dkv.kernels.triton_backend.attention_table import TABLE
from dkv.kernels.triton_backend.cases import Case, case
from dkv.kernels.triton_backend.launch import Launch, computable, power_of_two, precision, splits, strides, unit_stride
from dkv.kernels.workspace import Workspace

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
        arguments = (
            q, k, v, part, part_lse, query_lengths, key_ranges, key_mask, mask, query_blocks, key_blocks,
            (size**-0.5 if scale is None else scale) * LOG2E.value, tokens, slots,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides(query_lengths, 1), *strides(key_ranges, 2),
            *strides(key_mask, 2), *strides(mask, 3), *strides(query_blocks, 2), *strides(key_blocks, 2),
        )  # fmt: skip
        for launch in (row, _repairing(row)) if pairs else (row,):
            attention_kernel[(tiles * split, kv_heads, batch)](
                *arguments, GROUP=group, D=size, SPLITS=split, TESTED=tested, REPAIR=launch is not row, BLOCK_D=block_d,
                PRECISION=precision(q) if _multiplies_tf32(block_d, rules == "masked") else "ieee",
                WIDE=_wide(row, mask, k, v, key_mask, key_blocks), BLOCK_M=block_m, BLOCK_N=block_n,
                STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        if split > 1:
            rows = batch * tokens * heads
            merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
                part, part_lse, out, lse, rows, D=size, SPLITS=split, BLOCK_D=block_d, ROWS=MERGE_ROWS, num_warps=4
            )

    many = "few" if packed <= 16 else "some" if packed <= 64 else "many"
    pairs = mask is not None or block_ids is not None
    rules = "masked" if pairs or key_mask is not None else "plain"
    if out.numel():
        TABLE.start(q.device, (many, rules, q.element_size(), max(64, block_d)), run, row)
    out = out.to(dtype)
    return (out, lse) if return_lse else out


def _repairing(row: Launch) -> Launch:
    """The second launch over the same tiles, which has next to nothing to do where all numbers are finite."""
    return Launch(row.tile, row.warps)


def _tested(width: int, block_d: int, *rules) -> bool:
    """Whether every tile is tested: where a rule asks for it, or two loops would not fit the registers."""
    return any(rule is not None for rule in rules) or width * block_d > 512


def _multiplies_tf32(block_d: int, masked: bool) -> bool:
    """Whether the three TF32 products of a float32 one fit the registers."""
    return block_d <= (64 if masked else 128)


def _wide(row: Launch, mask: Tensor | None, *of_slots: Tensor | None) -> bool:
    """Whether an offset within a tile may pass 32 bits: of the mask, or of tensors [B, S, ...]."""
    queries, slots = row.tile
    farthest = [slots * x.stride(1) for x in of_slots if x is not None]
    farthest += [] if mask is None else [queries * mask.stride(1) + slots * mask.stride(2)]
    return 2 * max(farthest) >= 2**31


def audit_cases(arch: str) -> list[Case]:
    """Every row with all that its regime allows and a head that does not fill the tile; what `arch` runs also bare."""
    cases = [
        _case(arch, regime, row, full)
        for regime, row in TABLE.on(arch)
        for full in (True, False)
        if full or row == TABLE.row(arch, regime)
    ]
    masked = (regime for regime in TABLE.rows["default"] if regime[1] == "masked")
    cases += [_case(arch, regime, TABLE.row(arch, regime), True, repair=True) for regime in masked]
    return cases + [_merge_case(size) for size in (64, 128, 256)]


_RULES = ("key_mask", "mask", "query_blocks", "key_blocks")


def _case(arch: str, regime: tuple, row: Launch, full: bool, repair: bool = False) -> Case:
    many, rules, width, size = regime
    row = _repairing(row) if repair else row
    split, tf32 = 1 if many == "many" and not full else 4, _multiplies_tf32(size, rules == "masked")
    given = {"q", "k", "v", "out", *(("lengths", "ranges", "lse") if full else ()), *(("lse",) if split > 1 else ())}
    given |= set(() if rules == "plain" else _RULES if full else _RULES[:1])
    number = "bf16" if width == 2 else "fp32"
    pointers = dict.fromkeys(("q", "k", "v"), f"*{number}") | {"out": f"*{number if split == 1 else 'fp32'}"}
    pointers |= {"lse": "*fp32", "lengths": "*i64", "ranges": "*i64", "key_mask": "*i1", "mask": "*i1"}
    pointers |= {"query_blocks": "*i64", "key_blocks": "*i64"}
    constants = dict.fromkeys(set(pointers) - given) | {
        "GROUP": 7 if full else 1, "D": size - 16 if full else size, "SPLITS": split, "WIDE": False,
        "TESTED": rules == "masked" or width * size > 512, "REPAIR": repair, "BLOCK_D": size,
        "BLOCK_M": row.tile[0], "BLOCK_N": row.tile[1], "STAGES": row.stages,
        "PRECISION": "tf32x3" if width == 4 and arch.startswith("sm") and tf32 else "ieee",
    }  # fmt: skip
    dense = {f"stride_{x}" for x in ("qb", "qn", "qh", "kb", "ks", "kh", "vb", "vs", "vh")}
    expect = {
        "tensor core": width == 2 or tf32,
        "wgmma": width == 2 and row.tile[0] >= 64 and not repair,
        "async copy": row.stages > 1,
    }
    tile = "x".join(map(str, row.tile)) + " repair" * repair
    found = case(
        f"{many} {rules} {number} D{constants['D']} {tile}", attention_kernel, row,
        {n: kind for n, kind in pointers.items() if n in given} | {"scale": "fp32"}, constants,
        loose=tuple(n for n in attention_kernel.arg_names if n.startswith("stride_") and n not in dense),
        expect=tuple(family for family, there in expect.items() if there),
    )  # fmt: skip
    return replace(found, rare=repair)


def _merge_case(size: int) -> Case:
    constants = {"D": size, "SPLITS": MOST_PARTS, "BLOCK_D": size, "ROWS": MERGE_ROWS}
    types = {"part": "*fp32", "part_lse": "*fp32", "out": "*bf16", "lse": "*fp32"}
    return case(f"merge D{size}", merge_kernel, Launch((MERGE_ROWS,), 4), types, constants)
