"""The attention that slots get, in Triton."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dkv.kernels.common.arguments import computable, constants, precision, strided, unit_stride
from dkv.kernels.common.launch import Call, Launch, LaunchTable, batch_invariant, splits
from dkv.kernels.common.prepared import Scratch
from dkv.kernels.dev.cases import Case, buffer, calls_of, meta
from dkv.kernels.mass import torch as fallback
from dkv.kernels.mass.kernel import LOG2E, mass_kernel, total_kernel

# The launches. The tile is (packed queries, slots). A regime is how many packed queries there are ("few" up to 16,
# "some" up to 64, or "many") and whether keys are "int8", the bytes of a number of the queries, and the head size up to
# which the launch holds. A line lists (queries, slots, warps, stages) for each pair of the last two. None has been
# timed on a GPU; `dkv audit` finds no spilled registers.
_COLUMNS = ((2, 64), (2, 128), (2, 256), (4, 64), (4, 128), (4, 256))


def _entries(*lines: list) -> dict[tuple, Launch]:
    return {
        (many, *column): Launch((m, n), warps, stages)
        for many, *launches in lines
        for column, (m, n, warps, stages) in zip(_COLUMNS, launches, strict=False)
    }


_ENTRIES = {}
_ENTRIES["default"] = _entries(
    ["few", (16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2), (16, 64, 4, 2), (16, 32, 8, 2), (16, 16, 8, 1)],
    ["some", (64, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2), (16, 32, 8, 2), (16, 16, 8, 1)],
    ["many", (64, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 1), (32, 64, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)],
)
_ENTRIES["sm_80"] = _entries(
    ["some", (64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 8, 2)],
    ["many", (64, 128, 8, 3), (64, 64, 4, 3), (64, 64, 8, 2)],
)
_ENTRIES["sm_86"] = _ENTRIES["sm_120"] = _ENTRIES["sm_80"]  # sm_89 uses these too
_ENTRIES["sm_90"] = _entries(
    ["some", (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)],
    ["many", (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 8, 2)],
)
_TILES = {"few": 16, "some": 64, "many": 128}
_ENTRIES["interpreter"] = {regime: Launch((_TILES[regime[0]], 128), 4) for regime in _ENTRIES["default"]}
for _arch, _of_arch in _ENTRIES.items():
    _ENTRIES[_arch] = _of_arch | {(f"{many} int8", *column): launch for (many, *column), launch in _of_arch.items()}
# With more warps the cast of keys in 8 bits would spill registers.
_ENTRIES["default"] |= {(f"{many} int8", 4, 256): Launch((16, 16), 4) for many in _TILES}
TABLE = LaunchTable(
    "attention_mass",
    _ENTRIES,
    [Launch((m, n), *how) for m, n, *how in product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3))],
)

LARGEST_HEAD = 256
# The most parts that the queries of a row are divided in, and the programs of a multiprocessor. Not timed.
MOST_PARTS, RESIDENT = 32, 2
TOTAL = Launch((128,), 4)


class Rows(NamedTuple):
    """Where the queries of each row stand, and what they see."""

    query_starts: Tensor
    query_lengths: Tensor
    key_ranges: Tensor | None


def attention_mass(
    q, k_buf, lse, weight, query_starts, query_lengths, key_ranges, most_queries, scale, *, workspace=None, **_
) -> Tensor:
    """`dkv.kernels.attention_mass`. Heads of over 256 numbers do not fit the registers: PyTorch multiplies them."""
    rows = Rows(query_starts, query_lengths, key_ranges)
    if q.shape[-1] > LARGEST_HEAD:
        return fallback.attention_mass(q, k_buf, lse, weight, *rows, most_queries, scale, workspace=workspace)
    q, k = (unit_stride(computable(x)) for x in (q, k_buf.numbers))
    if not (k.shape[0] and k.shape[1] and most_queries):
        return lse.new_zeros(k.shape[:2])
    out = torch.empty(k.shape[:2], dtype=torch.float32, device=q.device)
    tensors = q, k, k_buf.scales, lse, weight, out, *rows
    TABLE.start(_plan, tensors, most_queries, scale, batch_invariant(), work=workspace)
    return out


def _plan(q, k, scales, lse, weight, out, *others):
    *rows, queries, scale, invariant = others
    (heads, size), (batch, slots, kv_heads) = q.shape[-2:], k.shape[:3]
    group = heads // kv_heads
    many = next((name for name in ("few", "some") if queries * group <= _TILES[name]), "many")
    tensors = {"q": strided(q), "k": strided(k), "lse": strided(lse), "weight": strided(weight)}
    tensors["key_scales"] = strided(scales)
    arguments = tensors | {"rows": Rows(*map(strided, rows)), "scale": scale * LOG2E.value, "slots": slots}
    sizes = {"HEADS": kv_heads, "GROUP": group, "D": size, "BLOCK_D": _block_d(size)}
    # The three TF32 products that stand for a float32 one take registers: counted by `dkv audit`.
    sizes["PRECISION"] = precision(q) if _block_d(size) <= 64 else "ieee"

    def calls(launch: Launch) -> list[Call]:
        block_m, block_n = launch.tile
        tiles, sweep = triton.cdiv(slots, block_n), kv_heads * triton.cdiv(queries * group, block_m)
        parts = splits(q.device, tiles * (1 if invariant else batch), min(MOST_PARTS, sweep), each=RESIDENT)
        part = out if parts == 1 else Scratch("parts of mass", (batch, parts, slots), torch.float32)
        wide = 2 * max(block_n * k.stride(1), block_m * q.stride(0), heads * q.stride(1)) >= 2**31
        known = constants(**sizes, BLOCK_M=block_m, BLOCK_N=block_n, WIDE=wide, STAGES=launch.stages)
        given = arguments | {"out": part, "parts": parts, "C": known}
        made = [Call(mass_kernel, (tiles, parts, batch), launch, given, rare=wide)]
        return made if parts == 1 else [*made, _total(part, out)]

    bits = "" if scales is None else " int8"
    return (many + bits, q.element_size(), max(64, _block_d(size))), calls


def _total(part: Scratch, out: Tensor) -> Call:
    (batch, parts, slots), (block,) = part.shape, TOTAL.tile
    arguments = {"part": part, "out": out, "slots": slots, "parts": parts, "BLOCK_P": MOST_PARTS, "BLOCK_N": block}
    return Call(total_kernel, (triton.cdiv(slots, block), batch), TOTAL, arguments)


def _block_d(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


# Queries of a regime, for 1 and for 7 query heads to a key head.
_QUERIES = {"few": (5, 2), "some": (33, 5), "many": (129, 19)}


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch in parts, for ranges and a head that does not fill the tile; what `arch` uses also bare, and with
    offsets that need 64 bits."""
    total = False
    for regime, launch in TABLE.on(arch):
        used = launch == TABLE.launch(arch, regime)
        for kind in ("full", "bare", "wide") if used and "int8" not in regime[0] else ("full",):
            calls = calls_of(arch, regime, launch, attention_mass, *_sample(regime, kind), parts=4)
            many, width, size = regime
            name = f"{many} {'bf16' if width == 2 else 'fp32'} D{size} {kind} {'x'.join(map(str, launch.tile))}"
            expected = ("tensor core",) if width == 2 or size <= 64 else ()
            expected += ("async copy",) if launch.stages > 1 and kind != "wide" else ()
            yield Case(f"attention_mass {name}", calls[0], expected)
            if not total:
                yield Case("attention_mass total", calls[1])
                total = True


def _sample(regime: tuple[str, int, int], kind: str) -> tuple[Any, ...]:
    """Arguments for a regime: one query head to a key head and every slot visible if bare, else seven and ranges."""
    many, width, size = regime
    bare, dtype = kind == "bare", "bf16" if width == 2 else "fp32"
    many, _, bits = many.partition(" ")
    queries, heads, size = _QUERIES[many][not bare], 4 if bare else 28, size if bare else size - 16
    q, apart = meta(2 * queries, heads, size, dtype=dtype), 2**29 if kind == "wide" else None
    k = buffer(2, 1001, 4, size, dtype=dtype, bits=bool(bits), apart=apart)
    lse, weight = meta(2 * queries, heads, dtype="fp32"), meta(2 * queries, dtype="fp32")
    starts, lengths, ranges = (meta(*shape, dtype=torch.int64) for shape in ((2,), (2,), (2, 2)))
    return q, k, lse, weight, starts, lengths, None if bare else ranges, queries, 0.125
