"""Attention of the active queries over the buffer, in Triton."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from dkv.kernels.attention import torch as fallback
from dkv.kernels.attention.kernel import LOG2E, attention_kernel, merge_kernel
from dkv.kernels.attention.reference import Rules
from dkv.kernels.common.arguments import computable, constants, precision, strided, unit_stride
from dkv.kernels.common.launch import Call, Launch, LaunchTable, splits
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.dev.cases import Case, calls_of, described, meta

# The launches. The tile is (packed queries, slots). A regime is how many packed queries there are ("few" up to 16,
# "some" up to 64, or "many"), whether a mask per slot or pair is given ("masked", else "plain"), the bytes of a number,
# and the head size up to which the launch holds. A line lists (queries, slots, warps, stages) for each pair of the last
# two. No entry has been timed on a GPU. They are the largest tiles, with as many loads in flight as fit, that
# `dkv audit` compiles for the architecture without spilled registers and within its shared memory.
_COLUMNS = ((2, 64), (2, 128), (2, 256), (4, 64), (4, 128), (4, 256))


def _entries(*lines: list) -> dict[tuple, Launch]:
    return {
        (many, rules, *column): Launch((m, n), warps, stages)
        for many, rules, *launches in lines
        for column, (m, n, warps, stages) in zip(_COLUMNS, launches, strict=False)
    }


_ENTRIES = {}
_ENTRIES["default"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 1), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["few", "masked", (16, 32, 4, 2), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1)],
    ["some", "plain", (32, 64, 4, 3), (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["some", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1)],
    ["many", "plain", (128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["many", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
)
_ENTRIES["sm_80"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 4, 1)],
    ["many", "plain", (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 1)],
    ["many", "masked", (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
)
_ENTRIES["sm_90"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)],
    ["many", "plain", (128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
    ["many", "masked", (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
)
_ENTRIES["sm_100"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 8, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 32, 4, 2)],
    ["many", "plain", (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
    ["many", "masked", (64, 64, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2)],
)
_ENTRIES["gfx942"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2)],
    ["some", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
    ["many", "plain", (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2), (32, 16, 8, 2)],
    ["many", "masked", (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
)
_TILES = {"few": 16, "some": 64, "many": 128}
_ENTRIES["interpreter"] = {regime: Launch((_TILES[regime[0]], 128), 4) for regime in _ENTRIES["default"]}

_CANDIDATES = product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
TABLE = LaunchTable("cached_attention", _ENTRIES, [Launch((m, n), *how) for m, n, *how in _CANDIDATES])

LARGEST_HEAD = 256
# The most parts that the slots are divided in: the merge holds a state of each in registers. Not timed.
MOST_PARTS = 16
MERGE = Launch((4,), 4)


def cached_attention(
    q: Tensor, k_buf: Tensor, v_buf: Tensor, rules: Rules, scale: float, return_lse: bool, *, workspace=None
) -> tuple[Tensor, Tensor | None]:
    """`dkv.kernels.cached_attention`. Heads of over 256 numbers do not fit the registers: PyTorch attends with them."""
    (_, tokens, heads, size), dtype = q.shape, q.dtype
    if size > LARGEST_HEAD:
        return fallback.cached_attention(q, k_buf, v_buf, rules, scale, return_lse, workspace=workspace)
    q, k, v = (unit_stride(computable(x)) for x in (q, k_buf, v_buf))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    work = workspace or Workspace()

    def calls(launch: Launch) -> list[Call]:
        return _calls(q, k, v, out, lse, rules, scale, work, launch)

    if out.numel():
        packed = tokens * (heads // k.shape[2])
        many = "few" if packed <= 16 else "some" if packed <= 64 else "many"
        TABLE.start(q.device, (many, _kind(rules), q.element_size(), max(64, _block_d(size))), calls)
    return out.to(dtype), lse


def _calls(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rules: Rules, scale: float, work, launch: Launch
) -> list[Call]:
    """The attention; again where NaN may have reached queries that do not see it; the merge of the parts."""
    (batch, tokens, heads, size), (slots, kv_heads) = q.shape, k.shape[1:3]
    (block_m, block_n), block_d, group = launch.tile, _block_d(size), heads // kv_heads
    tiles = triton.cdiv(tokens * group, block_m)
    split = splits(q.device, tiles * kv_heads * batch, batch, min(MOST_PARTS, triton.cdiv(slots, block_n) // 2))
    part, part_lse = out, lse
    if split > 1:
        part = work.take("parts", (*q.shape[:3], split, size), torch.float32, q.device)
        part_lse = work.take("parts lse", part.shape[:-1], torch.float32, q.device)
    masked, wide = _kind(rules) == "masked", _wide(launch, k, v, rules)
    tensors = {"q": strided(q), "k": strided(k), "v": strided(v), "out": part, "lse": part_lse}
    tensors["rules"] = Rules(*map(strided, rules))
    arguments = tensors | {"scale": scale * LOG2E.value, "tokens": tokens, "slots": slots}
    sizes = {"GROUP": group, "D": size, "SPLITS": split, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n}
    # Every tile is tested where a rule asks for it, or where a loop that tests and one that does not would not fit
    # the registers together: counted by `dkv audit`, from 512 bytes a head on.
    sizes |= {"TESTED": masked or q.element_size() * block_d > 512, "WIDE": wide}
    sizes["PRECISION"] = precision(q) if _tf32_fits(block_d, masked) else "ieee"
    grid = (tiles * split, kv_heads, batch)

    def attend(launch: Launch, repair: bool) -> Call:
        known = constants(**sizes, REPAIR=repair, STAGES=launch.stages)
        return Call(attention_kernel, grid, launch, arguments | {"C": known}, rare=repair or wide)

    calls = [attend(launch, False)]
    if rules.of_pairs:
        # Next to nothing to do where all numbers are finite.
        calls.append(attend(Launch(launch.tile, launch.warps), True))
    if split > 1:
        calls.append(_merge(part, part_lse, out, lse))
    return calls


def _merge(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor | None) -> Call:
    (split, size), entries = part.shape[-2:], out.shape[:3].numel()
    arguments = {"part": part, "part_lse": part_lse, "out": out, "lse": lse, "entries": entries}
    arguments |= {"D": size, "SPLITS": split, "BLOCK_D": _block_d(size), "ENTRIES": MERGE.tile[0]}
    return Call(merge_kernel, (triton.cdiv(entries, MERGE.tile[0]),), MERGE, arguments)


def _block_d(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


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
            parts = 1 if kind == "bare" and regime[0] == "many" else 4
            calls = calls_of(arch, regime, launch, cached_attention, *_sample(regime, kind), parts=parts)
            for call in calls if used else calls[:1]:
                content = call.kernel, call.launch, described(call)
                if content not in seen:
                    seen.append(content)
                    yield Case(_name(regime, call, kind), call, _expected(regime, call))


def _sample(regime: tuple[str, str, int, int], kind: str) -> tuple[Any, ...]:
    """Arguments of an attention of a regime: with one rule at most if bare, else with all that it allows."""
    many, masking, width, size = regime
    bare, masked, dtype = kind == "bare", masking == "masked", "bf16" if width == 2 else "fp32"
    tokens, slots, apart = _QUERIES[many][not bare], 1001, 2**29 if kind == "wide" else None
    size = size if bare else size - 16
    q = meta(2, tokens, 4 if bare else 28, size, dtype=dtype)
    k, v = (meta(2, slots, 4, size, dtype=dtype, apart=apart) for _ in range(2))
    rules: dict[str, Tensor] = {}
    if masked:
        rules["key_mask"] = meta(2, slots, dtype=torch.bool)
    if not bare:
        shapes = {"query_lengths": (2,), "key_ranges": (2, 2)}
        if masked:
            shapes |= {"query_blocks": (2, tokens), "key_blocks": (2, slots)}
            rules["mask"] = meta(2, tokens, slots, dtype=torch.bool)
        rules |= {name: meta(*shape, dtype=torch.int64) for name, shape in shapes.items()}
    return q, k, v, Rules(**rules), 0.125, not bare


def _name(regime: tuple[str, str, int, int], call: Call, kind: str) -> str:
    many, masking, width, size = regime
    start = f"{many} {masking} {'bf16' if width == 2 else 'fp32'} D{size if kind == 'bare' else size - 16}"
    if call.kernel is merge_kernel:
        return f"{start} {kind} merge"
    wide, repair = (
        " " + name.lower() if getattr(call.arguments["C"], name).value else "" for name in ("WIDE", "REPAIR")
    )
    return f"{start} {'x'.join(map(str, call.launch.tile))}{wide}{repair}"


def _expected(regime: tuple[str, str, int, int], call: Call) -> tuple[str, ...]:
    """Families of instructions that an attention kernel must have."""
    if call.kernel is merge_kernel:
        return ()
    _, masking, width, size = regime
    families = {
        # On AMD also in float32, which its matrix instructions multiply as it is.
        "tensor core": width == 2 or _tf32_fits(size, masking == "masked"),
        "wgmma": width == 2 and call.launch.tile[0] >= 64 and not call.rare,
        "async copy": call.launch.stages > 1 and not call.rare,
    }
    return tuple(family for family, there in families.items() if there)
