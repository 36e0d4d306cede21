"""Attention of the active queries over the buffer, in Triton; `kernel` has the kernels, `launch` their launches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from dkv.kernels.attention import torch as fallback
from dkv.kernels.attention.kernel import LOG2E, attention_kernel, merge_kernel
from dkv.kernels.attention.launch import TABLE
from dkv.kernels.attention.rules import Rules
from dkv.kernels.common.launch import Call, Launch, computable, power_of_two, precision, splits, strides, unit_stride
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.dev.cases import Case, calls_of, case, meta

LARGEST_HEAD = 256
# The most parts that the slots are divided in: the merge holds a state of each in registers. Not timed.
MOST_PARTS = 16
MERGE = Launch((4,), 4)


def cached_attention(
    q: Tensor, k_buf: Tensor, v_buf: Tensor, rules: Rules, scale: float, return_lse: bool, workspace=None,
    *, parts: int | None = None, launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`dkv.kernels.cached_attention`: the output, and the log-sum-exp where it is asked for.

    Heads of more than 256 numbers do not fit the registers: PyTorch attends with them.

    Args:
        parts: in how many parts the slots are divided, if the device is not to decide.
        launch: used in place of the table's.
    """
    (_, tokens, heads, size), dtype = q.shape, q.dtype
    if size > LARGEST_HEAD:
        return fallback.cached_attention(q, k_buf, v_buf, rules, scale, return_lse, workspace)
    q, k, v = (unit_stride(computable(x)) for x in (q, k_buf, v_buf))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    work = Workspace() if workspace is None else workspace

    def calls(launch: Launch) -> list[Call]:
        return _calls(q, k, v, out, lse, rules, scale, work, parts, launch)

    if out.numel():
        packed = tokens * (heads // k.shape[2])
        many = "few" if packed <= 16 else "some" if packed <= 64 else "many"
        TABLE.start(q.device, (many, _kind(rules), q.element_size(), max(64, _block_d(size))), calls, launch)
    return out.to(dtype), lse


def _calls(q, k, v, out, lse, rules: Rules, scale, work: Workspace, parts, launch: Launch) -> list[Call]:
    """The attention; again where NaN may have reached queries that do not see it; the merge of the parts."""
    (batch, tokens, heads, size), (slots, kv_heads) = q.shape, k.shape[1:3]
    (block_m, block_n), block_d, group = launch.tile, _block_d(size), heads // kv_heads
    tiles = triton.cdiv(tokens * group, block_m)
    split = parts
    if split is None:
        most = min(MOST_PARTS, triton.cdiv(slots, block_n) // 2)
        split = splits(q.device, tiles * kv_heads * batch, batch, most)
    part, part_lse = out, lse
    if split > 1:
        part = work.take("parts", (*q.shape[:3], split, size), torch.float32, q.device)
        part_lse = work.take("parts lse", part.shape[:-1], torch.float32, q.device)
    masked, bits = _kind(rules) == "masked", 8 * q.element_size()
    arguments = {
        "q": q, "k": k, "v": v, "out": part, "lse": part_lse,
        "lengths": rules.query_lengths, "ranges": rules.key_ranges, "key_mask": rules.key_mask, "mask": rules.mask,
        "query_blocks": rules.query_blocks, "key_blocks": rules.key_blocks,
        "scale": scale * LOG2E.value, "tokens": tokens, "slots": slots,
        "GROUP": group, "D": size, "SPLITS": split, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n,
        # Every tile is tested where a rule asks for it, or where a loop that tests and one that does not would not fit
        # the registers together: counted by `dkv audit`, from 512 bytes a head on.
        "TESTED": masked or bits // 8 * block_d > 512,
        "PRECISION": precision(q) if _tf32_fits(block_d, masked) else "ieee",
        "WIDE": _wide(launch, k, v, rules),
    }  # fmt: skip
    arguments |= strides(
        q=(q, "bnh"), k=(k, "bsh"), v=(v, "bsh"), l=(rules.query_lengths, "b"), r=(rules.key_ranges, "be"),
        km=(rules.key_mask, "bs"), m=(rules.mask, "bns"), qb=(rules.query_blocks, "bn"), kb=(rules.key_blocks, "bs"),
    )  # fmt: skip
    grid = (tiles * split, kv_heads, batch)

    def attend(launch: Launch, repair: bool) -> Call:
        own = {"REPAIR": repair, "STAGES": launch.stages}
        return Call(attention_kernel, grid, launch, arguments | own, rare=repair or arguments["WIDE"])

    calls = [attend(launch, False)]
    if rules.of_pairs:
        # Next to nothing to do where all numbers are finite.
        calls.append(attend(Launch(launch.tile, launch.warps), True))
    if split > 1:
        calls.append(_merge(part, part_lse, out, lse, split))
    return calls


def _merge(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor | None, split: int) -> Call:
    rows, size = out.shape[:3].numel(), out.shape[3]
    arguments = {
        "part": part, "part_lse": part_lse, "out": out, "lse": lse, "rows": rows,
        "D": size, "SPLITS": split, "BLOCK_D": _block_d(size), "ROWS": MERGE.tile[0],
    }  # fmt: skip
    return Call(merge_kernel, (triton.cdiv(rows, MERGE.tile[0]),), MERGE, arguments)


def _block_d(size: int) -> int:
    return max(16, power_of_two(size))


def _kind(rules: Rules) -> str:
    return "masked" if rules.of_pairs or rules.key_mask is not None else "plain"


def _tf32_fits(block_d: int, masked: bool) -> bool:
    """Whether the registers hold the three TF32 products that stand for a float32 one."""
    return block_d <= (64 if masked else 128)


def _wide(launch: Launch, k: Tensor, v: Tensor, rules: Rules) -> bool:
    """Whether an offset within a tile may pass 32 bits: of the mask, or of tensors [B, S, ...]."""
    queries, slots = launch.tile
    farthest = [slots * x.stride(1) for x in (k, v, rules.key_mask, rules.key_blocks) if x is not None]
    if rules.mask is not None:
        farthest.append(queries * rules.mask.stride(1) + slots * rules.mask.stride(2))
    return 2 * max(farthest) >= 2**31


# Queries of a regime, for 1 and for 7 query heads to a key head.
_QUERIES = {"few": (5, 2), "some": (33, 5), "many": (129, 19)}


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch with all that its regime allows and a head that does not fill the tile; what `arch` uses also bare,
    and with offsets that need 64 bits."""
    seen = []
    for regime, launch in TABLE.on(arch):
        used = launch == TABLE.launch(arch, regime)
        for kind in ("full", "bare", "wide") if used else ("full",):
            calls = calls_of(arch, regime, launch, lambda: _sample(regime, launch, kind))  # noqa: B023
            for call in calls if used else calls[:1]:
                made = case(_name(regime, call, kind), call, _expected(regime, call))
                content = replace(made, name="")
                if content not in seen:
                    seen.append(content)
                    yield made


def _sample(regime: tuple[str, str, int, int], launch: Launch, kind: str) -> None:
    """Attend with tensors of a regime: with one rule at most if bare, else with all that it allows."""
    many, masking, width, size = regime
    bare, dtype = kind == "bare", torch.bfloat16 if width == 2 else torch.float32
    group, slots = (1 if bare else 7), 1001
    tokens = _QUERIES[many][not bare]
    size = size if bare else size - 16
    apart = 2**29 if kind == "wide" else None
    q = meta(2, tokens, 4 * group, size, dtype=dtype)
    k, v = (meta(2, slots, 4, size, dtype=dtype, apart=apart) for _ in range(2))
    rules: dict[str, Any] = {}
    if masking == "masked":
        rules["key_mask"] = meta(2, slots, dtype=torch.bool)
    if not bare:
        rules["query_lengths"] = meta(2, dtype=torch.int64)
        rules["key_ranges"] = meta(2, 2, dtype=torch.int64)
    if masking == "masked" and not bare:
        rules["mask"] = meta(2, tokens, slots, dtype=torch.bool)
        rules["query_blocks"] = meta(2, tokens, dtype=torch.int64)
        rules["key_blocks"] = meta(2, slots, dtype=torch.int64)
    parts = 1 if bare and many == "many" else 4
    cached_attention(q, k, v, Rules(**rules), 0.125, not bare, parts=parts, launch=launch)


def _name(regime: tuple[str, str, int, int], call: Call, kind: str) -> str:
    many, masking, width, _ = regime
    number, size = ("bf16" if width == 2 else "fp32"), call.arguments["D"]
    if call.kernel is merge_kernel:
        return f"{many} {masking} {number} D{size} {kind} merge"
    tile = "x".join(map(str, call.launch.tile))
    repair = " repair" if call.arguments["REPAIR"] else ""
    return f"{many} {masking} {number} D{size} {tile}{' wide' if call.arguments['WIDE'] else ''}{repair}"


def _expected(regime: tuple[str, str, int, int], call: Call) -> list[str]:
    """Families of instructions that an attention kernel must have."""
    if call.kernel is merge_kernel:
        return []
    _, masking, width, size = regime
    families = {
        # On AMD also in float32, which its matrix instructions multiply as it is.
        "tensor core": width == 2 or _tf32_fits(size, masking == "masked"),
        "wgmma": width == 2 and call.launch.tile[0] >= 64 and not call.rare,
        "async copy": call.launch.stages > 1 and not call.rare,
    }
    return [family for family, there in families.items() if there]
