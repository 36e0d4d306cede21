"""Attention of the active queries over the buffer, in Triton."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dkv.kernels.attention import torch as fallback
from dkv.kernels.attention.kernel import LOG2E, attention_kernel, merge_kernel
from dkv.kernels.attention.launches import TABLE
from dkv.kernels.attention.reference import Rules
from dkv.kernels.common.arguments import computable, constants, precision, restored, strided, strided_alone, unit_stride
from dkv.kernels.common.launch import Call, Launch, batch_invariant, chip, splits
from dkv.kernels.common.prepared import Scratch
from dkv.kernels.common.stored import Stored
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.dev.cases import Case, buffer, calls_of, described, meta

LARGEST_HEAD = 256
# The kernel multiplies the largest product of a query by the scale, so the scale must be positive, in float32.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# The most parts that the slots are divided in. The merge has room for so many, so that one kernel serves any number of
# them, and takes few entries to a program, as it holds all parts of each in registers. A part may be one tile of slots:
# what it leaves for the merge stays in the L2 cache, and other multiprocessors would idle. Not timed.
MOST_PARTS = 32
# Fewer tiles of slots than these are not divided, as the merge is one more launch. Not timed.
DIVIDED_TILES = 4
MERGE = {"default": Launch((1,), 8), "interpreter": Launch((64,), 4)}


def cached_attention(
    q: Tensor,
    k_buf: Stored,
    v_buf: Stored,
    rules: Rules,
    most_queries: int,
    scale: float,
    return_lse: bool,
    *,
    workspace: Workspace | None = None,
    **_,
) -> tuple[Tensor, Tensor | None]:
    """`dkv.kernels.cached_attention`. Heads of over 256 numbers do not fit the registers: PyTorch attends with them.

    With masks keys and values in 8 bits are brought back before; `Transformer` asks for none.
    """
    if q.shape[-1] > LARGEST_HEAD:
        return fallback.cached_attention(q, k_buf, v_buf, rules, most_queries, scale, return_lse, workspace=workspace)
    dtype = q.dtype
    if not scale >= SMALLEST_SCALE:
        q, scale = (-q, -scale) if scale <= -SMALLEST_SCALE else (q * (0 * scale), 1.0)
    if rules.masked:
        k_buf, v_buf = Stored(k_buf.plain(q.dtype)), Stored(v_buf.plain(q.dtype))
    q, k, v = (unit_stride(computable(x)) for x in (q, k_buf.numbers, v_buf.numbers))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel() and len(k) and most_queries:
        tensors = q, k, k_buf.scales, v, v_buf.scales, out, lse, *rules
        TABLE.start(_plan, tensors, most_queries, scale, batch_invariant(), work=workspace)
    return restored(out, dtype), lse


def _plan(q, k, k_scales, v, v_scales, out, lse, *others):
    *rules, tokens, scale, invariant = others
    keys, values = Stored(k, k_scales), Stored(v, v_scales)
    rules, packed, size = Rules(*rules), tokens * (q.shape[-2] // k.shape[2]), q.shape[-1]
    many = "few" if packed <= 16 else "some" if packed <= 64 else "many"

    def calls(launch: Launch) -> list[Call]:
        return _calls(q, keys, values, out, lse, rules, tokens, scale, invariant, launch)

    return (many, _kind(rules, keys), q.element_size(), max(64, _block_d(size))), calls


def _calls(
    q: Tensor,
    k: Stored,
    v: Stored,
    out: Tensor,
    lse: Tensor | None,
    rules: Rules,
    tokens: int,
    scale: float,
    invariant: bool,
    launch: Launch,
) -> list[Call]:
    """The attention; again where NaN may have reached queries that do not see it; the merge of the parts."""
    (heads, size), (batch, slots, kv_heads) = q.shape[-2:], k.shape[:3]
    (block_m, block_n), block_d, group = launch.tile, _block_d(size), heads // kv_heads
    tiles, slot_tiles = triton.cdiv(tokens * group, block_m), triton.cdiv(slots, block_n)
    most = min(MOST_PARTS, slot_tiles) if slot_tiles >= DIVIDED_TILES else 1
    split = splits(q.device, tiles * kv_heads * (1 if invariant else batch), most)
    part, part_lse = out, lse
    if split > 1:
        part = Scratch("parts", (*q.shape[:-1], split, size), torch.float32)
        part_lse = Scratch("parts lse", part.shape[:-1], torch.float32)
    masked, wide = rules.masked, _wide(launch, k, v, rules)
    queries = strided(q) if rules.query_starts is None else strided_alone(q)
    tensors = {"q": queries, "out": part, "lse": part_lse}
    tensors |= {name: Stored(*map(strided, x)) for name, x in (("k", k), ("v", v))}
    tensors["rules"] = Rules(*map(strided, rules))
    arguments = tensors | {"scale": scale * LOG2E.value, "tokens": tokens, "slots": slots}
    # With masks a number that is not known at compile time would cost registers: counted by `dkv audit`.
    arguments["splits"] = tl.constexpr(split) if masked or split == 1 else split
    sizes = {"GROUP": group, "D": size, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n}
    # Every tile is tested where a rule asks for it, or where a loop that tests and one that does not would not fit
    # the registers together: counted by `dkv audit`, from 512 bytes a head on, with ends of the queries from 256 on.
    # With a gap up to four tiles are cut, which in a loop of their own would be loaded one after the other.
    most_bytes = 512 if rules.query_ends is None else 256
    tested = masked or rules.key_gaps is not None or q.element_size() * block_d > most_bytes
    sizes |= {"WIDE": wide, "PRECISION": precision(q) if _tf32_fits(block_d, masked) else "ieee"}
    grid = (tiles * split, kv_heads, batch)

    def attend(launch: Launch, repair: bool) -> Call:
        known = constants(**sizes | {"TESTED": tested or repair}, REPAIR=repair, STAGES=launch.stages)
        return Call(attention_kernel, grid, launch, arguments | {"C": known}, rare=repair or wide)

    calls = [attend(launch, False)]
    if rules.of_pairs and v.scales is None:
        # Next to nothing to do where all numbers are finite.
        calls.append(attend(Launch(launch.tile, launch.warps), True))
    if split > 1:
        calls.append(_merge(part, part_lse, out, lse))
    return calls


def _merge(part: Scratch, part_lse: Scratch, out: Tensor, lse: Tensor | None) -> Call:
    (split, size), entries = part.shape[-2:], out.shape[:-1].numel()
    arguments = {"part": part, "part_lse": part_lse, "out": out, "lse": lse, "entries": entries, "splits": split}
    launch = MERGE.get(chip(out.device).arch, MERGE["default"])
    arguments |= {"D": size, "BLOCK_P": MOST_PARTS, "BLOCK_D": _block_d(size), "ENTRIES": launch.tile[0]}
    return Call(merge_kernel, (triton.cdiv(entries, launch.tile[0]),), launch, arguments)


def _block_d(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _kind(rules: Rules, k: Stored) -> str:
    ends, bits = "" if rules.query_ends is None else " ends", "" if k.scales is None else " int8"
    return ("masked" if rules.masked else "plain") + ends + bits


def _tf32_fits(block_d: int, masked: bool) -> bool:
    """Whether the registers hold the three TF32 products that stand for a float32 one."""
    return block_d <= (64 if masked else 128)


def _wide(launch: Launch, k: Stored, v: Stored, rules: Rules) -> bool:
    """Whether an offset within a tile may pass 32 bits: of the mask, or of tensors [B, S, ...]."""
    queries, slots = launch.tile
    farthest = [slots * x.stride(1) for x in (*k, *v, rules.key_mask, rules.key_blocks) if x is not None]
    if rules.mask is not None:
        farthest.append(queries * rules.mask.stride(1) + slots * rules.mask.stride(2))
    return 2 * max(farthest) >= 2**31


# Queries of a regime, for 1 and for 7 query heads to a key head.
_QUERIES = {"few": (5, 2), "some": (33, 5), "many": (129, 19)}


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch with all that its regime allows and a head that does not fill the tile; what `arch` uses also with a
    gap, bare, and but for 8 bits with offsets that need 64 bits, where queries have no ends."""
    seen = []
    for regime, launch in TABLE.on(arch):
        used = launch == TABLE.launch(arch, regime)
        kinds = ("full", "bare", "gap") if regime[1].endswith("int8") else ("full", "bare", "gap", "wide")
        for kind in kinds if used and "ends" not in regime[1] else ("full",):
            parts = 1 if kind == "bare" and regime[0] == "many" else 4
            calls = calls_of(arch, regime, launch, cached_attention, *_sample(regime, kind), parts=parts)
            for call in calls if used else calls[:1]:
                content = call.kernel, call.launch, described(call)
                if content not in seen:
                    seen.append(content)
                    yield Case(_name(regime, call, kind), call, _expected(regime, call))


def _sample(regime: tuple[str, str, int, int], kind: str) -> tuple[Any, ...]:
    """Arguments of an attention of a regime: bare with one rule at most, else with all that it allows but a gap."""
    many, masking, width, size = regime
    masked, ends = masking.startswith("masked"), "ends" in masking
    bare, dtype = kind == "bare", "bf16" if width == 2 else "fp32"
    tokens, slots, apart = _QUERIES[many][not bare], 1001, 2**29 if kind == "wide" else None
    size = size if bare else size - 16
    # Packed, where nothing asks for [B, N].
    paired = masked and not ends
    q = meta(*((2, tokens) if bare or paired else (2 * tokens,)), 4 if bare else 28, size, dtype=dtype)
    k, v = (buffer(2, slots, 4, size, dtype=dtype, bits=masking.endswith("int8"), apart=apart) for _ in range(2))
    rules: dict[str, Tensor] = {}
    if masked:
        rules["key_mask"] = meta(2, slots, dtype=torch.bool)
    if not bare:
        shapes = {"query_lengths": (2,), "key_ranges": (2, 2)}
        if paired:
            shapes |= {"query_blocks": (2, tokens), "key_blocks": (2, slots)}
            rules["mask"] = meta(2, tokens, slots, dtype=torch.bool)
        else:
            shapes["query_starts"] = (2,)
        if kind == "gap":
            shapes["key_gaps"] = (2, 2)
        if ends:
            shapes["query_ends"] = (2 * tokens,)
        rules |= {name: meta(*shape, dtype=torch.int64) for name, shape in shapes.items()}
    return q, k, v, Rules(**rules), tokens, 0.125, not bare


def _name(regime: tuple[str, str, int, int], call: Call, kind: str) -> str:
    many, masking, width, size = regime
    start = f"{many} {masking} {'bf16' if width == 2 else 'fp32'} D{size if kind == 'bare' else size - 16}"
    if call.kernel is merge_kernel:
        return f"{start} {kind} merge"
    wide, repair = (
        " " + name.lower() if getattr(call.arguments["C"], name).value else "" for name in ("WIDE", "REPAIR")
    )
    rule = "" if call.arguments["rules"].key_gaps is None else " gap"
    return f"{start} {'x'.join(map(str, call.launch.tile))}{rule}{wide}{repair}"


def _expected(regime: tuple[str, str, int, int], call: Call) -> tuple[str, ...]:
    """Families of instructions that an attention kernel must have."""
    if call.kernel is merge_kernel:
        return ()
    _, masking, width, size = regime
    families = {
        # On AMD also in float32, which its matrix instructions multiply as it is.
        "tensor core": width == 2 or _tf32_fits(size, masking.startswith("masked")),
        "wgmma": width == 2 and call.launch.tile[0] >= 64 and not call.rare,
        "async copy": call.launch.stages > 1 and not call.rare,
    }
    return tuple(family for family, there in families.items() if there)
