"""The choice of a token and its confidence, from logits or fused with the LM head, in Triton.

The vocabulary is divided among several programs; each passes once over its columns and leaves the
state of its rows (see `kernel`), which a second kernel merges. Logits in float32 live in registers alone. For many rows
a matrix product of the vendor's library is faster: it makes logits of one strip of the vocabulary after the other.
top-k and top-p need the ids in order, and confidences in the dtype of the logits a softmax that is rounded in the
middle, which one pass does not give: PyTorch chooses with them.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dkv.kernels.choose import torch as fallback
from dkv.kernels.choose.choice import RULES, Choice
from dkv.kernels.choose.kernel import FLOATS, IDS, choose_kernel, merge_kernel
from dkv.kernels.choose.part import part_of
from dkv.kernels.choose.temperature import computable as computable_temperature
from dkv.kernels.choose.temperature import shares
from dkv.kernels.common.arguments import Strided, computable, constants, precision, strided
from dkv.kernels.common.launch import Call, Launch, LaunchTable, batch_invariant, chip, splits
from dkv.kernels.common.prepared import Product, Scratch
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.dev.cases import Case, calls_of, meta

# The launches. None has been timed on a GPU; `dkv audit` finds no spilled registers.
# Tile: (rows, ids). Regime: the best id, or one that is drawn.
TABLE = LaunchTable(
    "choose_token",
    {
        "default": {regime: Launch((1, 2048), 8) for regime in ("best", "drawn")},
        "interpreter": {regime: Launch((256, 4096), 4) for regime in ("best", "drawn")},
    },
    [Launch((1, ids), warps) for ids, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16))],
)
# With half the bytes more of them are to be on their way.
_INT8 = {("few int8", 2): Launch((16, 64, 128), 8, 4), ("many int8", 2): Launch((64, 128, 128), 8, 4)}
_ROWS = {"few": 16, "many": 64}
# Tile: (rows, ids, numbers of a hidden state). Regime: how many rows ("few" up to 16), whether the head has 8 bits, and
# bytes of a number of x.
FUSED_TABLE = LaunchTable(
    "choose_token_fused",
    {
        "default": {
            ("few", 2): Launch((16, 64, 64), 8, 3),
            # Twice as many numbers at a time spill a register, on sm_90 with 4 warps and on sm_100 with 8, where an
            # entropy is worked out: counted by ptxas, not timed.
            ("few", 4): Launch((16, 64, 16), 8, 3),
            ("many", 2): Launch((64, 128, 64), 8, 2),
            ("many", 4): Launch((64, 32, 32), 8, 2),
            ("few int8", 2): Launch((16, 64, 64), 8, 4),
            ("few int8", 4): Launch((16, 64, 16), 8, 3),
            ("many int8", 2): Launch((64, 128, 64), 8, 2),
            ("many int8", 4): Launch((64, 32, 32), 8, 2),
        },
        "sm_80": {("many", 4): Launch((64, 64, 32), 8, 2)},
        "sm_90": {
            ("few", 2): Launch((16, 64, 128), 8, 3),
            ("many", 2): Launch((64, 128, 64), 8, 3),
            ("many", 4): Launch((64, 64, 32), 8, 2),
            **_INT8,
        },
        # Twice as many ids at a time leave no register free when tokens are drawn, on sm_90 neither: counted by ptxas,
        # not timed.
        "sm_100": {("few", 2): Launch((16, 64, 128), 8, 3), ("many", 2): Launch((64, 128, 64), 8, 3), **_INT8},
        "gfx942": {("many", 4): Launch((64, 64, 32), 8, 2)},
        "interpreter": {
            (many + kind, number): Launch((_ROWS[many], 1024, 64), 4)
            for many, kind, number in product(_ROWS, ("", " int8"), (2, 4))
        },
    },
    [
        Launch(tile, warps, stages)
        for tile in product((16, 64, 128), (64, 128), (32, 64, 128))
        for warps, stages in product((4, 8), (2, 3, 4))
    ],
)
# The most rows for which the kernel itself multiplies with the head, by architecture and bytes of a number. It reads
# the weights once for every 64 rows, while with many rows a library is bound by its arithmetic alone. The border of
# half precision is an estimate for an H100, which nothing has timed; in float32 the kernel has the faster product.
MOST_FUSED = {"default": {2: 96, 4: math.inf}, "interpreter": {2: 64, 4: 64}}
# Of logits in float32 that are held at a time: they should stay in the second-level cache, of 40 MB or more.
STRIP_BYTES = 32 << 20
WIDE_PRODUCT = "dtype_out" in torch.ops.aten.mm.overloads()  # since PyTorch 2.8
# States in a tile of the merge: as many rows as fit beside the parts.
MERGE = Launch((1024,), 4)
# Programs of a processor at a time, and the most parts of a vocabulary: of logits, and fused.
EACH, MOST_PARTS = 4, 64
FUSED_EACH, FUSED_MOST_PARTS = 2, 256


def choose_token(logits, choice: Choice, row_keys, *, overwrite=False, workspace=None) -> fallback.Found:
    if choice.confidence_dtype != "exact" or choice.filters(logits.shape[1]):
        return fallback.choose_token(logits, choice, row_keys, overwrite=overwrite, workspace=workspace)
    return _choose(logits, None, None, choice, row_keys, workspace)


def choose_token_fused(hidden, head_weight, choice: Choice, head_bias, head_scales, row_keys, *, workspace=None):
    of_part, whole = part_of(head_weight), isinstance(head_weight, Tensor)
    if of_part or (whole and (choice.confidence_dtype != "exact" or choice.filters(len(head_weight)))):
        given = hidden, head_weight, choice, head_bias, head_scales, row_keys
        return fallback.choose_token_fused(*given, workspace=workspace)
    if not whole:
        return choose_token(head_weight(hidden), choice, row_keys, workspace=workspace)
    if head_scales is None and len(hidden) > most_fused(hidden):
        return by_strips(hidden, head_weight, choice, head_bias, row_keys, workspace)
    return by_kernel(hidden, head_weight, choice, head_bias, row_keys, workspace, head_scales)


def has_strips(device: torch.device) -> bool:
    """Whether PyTorch has the product for `by_strips`; the interpreter does with another."""
    arch = chip(device).arch
    return arch == "interpreter" or (arch.startswith("sm_") and WIDE_PRODUCT)


def most_fused(hidden: Tensor) -> float:
    """The most rows for which `by_kernel` is taken.

    With DKV_BATCH_INVARIANT=1 for any number: the sums of a library's product are in another order for other rows.
    """
    if batch_invariant() or not has_strips(hidden.device):
        return math.inf
    arch = chip(hidden.device).arch
    return MOST_FUSED.get(arch, MOST_FUSED["default"])[hidden.element_size()]


def by_kernel(
    hidden, head_weight, choice, head_bias, row_keys, work: Workspace | None, head_scales=None
) -> fallback.Found:
    """`choose_token_fused` with the product inside the kernel."""
    return _choose(hidden, head_weight, head_bias, choice, row_keys, work, head_scales)


def by_strips(hidden, head_weight, choice, head_bias, row_keys, work: Workspace | None) -> fallback.Found:
    """`choose_token_fused` with logits of a strip of the vocabulary at a time from PyTorch's product, in float32."""
    return _choose(hidden, head_weight, head_bias, choice, row_keys, work, strips=True)


def _choose(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    choice: Choice,
    row_keys: Tensor | None,
    work: Workspace | None,
    scales: Tensor | None = None,
    strips: bool = False,
) -> fallback.Found:
    """Choose by logits x [R, V], or by x @ weight.T + bias, multiplied by the kernel or, in `strips`, by PyTorch."""
    x, weight, bias = (tensor if tensor is None else computable(tensor) for tensor in (x, weight, bias))
    token = torch.empty(len(x), dtype=torch.int64, device=x.device)
    confidence = torch.empty(len(x), dtype=torch.float32, device=x.device)
    entropy = torch.empty_like(confidence) if choice.entropy else None
    if len(x):
        tensors = (x, weight, scales, bias, row_keys, token, confidence, entropy)
        table = TABLE if weight is None or strips else FUSED_TABLE
        table.start(_plan, tensors, choice, batch_invariant(), strips, work=work)
    return token, confidence, entropy


def _plan(x, weight, scales, bias, row_keys, token, confidence, entropy, choice, invariant, strips):
    (rows, size), vocabulary, drawn = x.shape, x.shape[1] if weight is None else len(weight), choice.temperature > 0
    fused = weight is not None and not strips
    heat = computable_temperature(choice.confidence_temperature, torch.float32)
    heat = (heat, *(shares(choice.temperature, torch.float32) if drawn else (0.0, 0.0)))
    own = {"bias": strided(bias), "scales": strided(scales), "row_keys": strided(row_keys if drawn else None)}
    own |= {"vocabulary": vocabulary, "size": size, "limit": choice.limit(vocabulary), "BANNED": choice.banned}
    rule = {"RULE": choice.rule, "TEMPERED": choice.confidence_temperature != 1}
    rule |= {"ENTROPY": choice.entropy or choice.rule == "entropy", "KEYS": row_keys.shape[1] if drawn else 0}

    def calls(launch: Launch) -> Iterator[Call | Product]:
        block_r, block_v, block_d = (*launch.tile, 1)[:3]
        if not fused:
            block_r, block_v = min(block_r, _power(rows)), min(block_v, max(16, _power(vocabulary)))
        programs, tiles = triton.cdiv(rows, block_r), triton.cdiv(vocabulary, block_v)
        cut = _cut(x.device, rows, 1 if invariant else programs, tiles, block_v, fused, strips)
        known = rule | {"PARTS": cut.parts}
        shared = {
            "rows": rows,
            "heat": heat,
            "floats": Scratch("choice", (rows, cut.parts, FLOATS.value), torch.float32),
            "ids": Scratch("choice", (rows, cut.parts, IDS.value), torch.int32),
        }
        merged = {"token_out": token, "confidence_out": confidence, "entropy_out": entropy, "C": constants(**known)}
        merged |= {"BLOCK_P": _power(cut.parts), "BLOCK_R": max(1, MERGE.tile[0] // _power(cut.parts))}
        known |= {"BLOCK_R": block_r, "BLOCK_V": block_v, "BLOCK_D": block_d, "EVEN": size % block_d == 0}
        known |= {"PRECISION": precision(x), "STAGES": launch.stages}
        arguments = shared | own | {"tiles": cut.tiles, "C": constants(**known)}
        if not strips:
            arguments |= {"x": strided(x), "weight": strided(weight), "first_column": 0}
            yield Call(choose_kernel, (programs, cut.parts), launch, arguments)
        else:
            of_part = cut.tiles * block_v
            for start in range(0, vocabulary, cut.strip * of_part):
                stop, first = min(start + cut.strip * of_part, vocabulary), start // of_part
                logits = Scratch("strip", (rows, stop - start), torch.float32)
                yield Product(x, weight, start, stop, logits)
                # The last parts may have no columns; their states are written all the same.
                parts = cut.strip if stop < vocabulary else cut.parts - first
                arguments |= {"x": Strided(logits, (stop - start, 1)), "weight": None, "first_column": start}
                yield Call(choose_kernel, (programs, parts), launch, dict(arguments))
        yield Call(merge_kernel, (triton.cdiv(rows, merged["BLOCK_R"]),), MERGE, shared | merged)

    # With DKV_BATCH_INVARIANT=1 the small tile is used for any number of rows: another changes the order of the sums.
    many = "few" if rows <= 16 or invariant else "many"
    many += " int8" if scales is not None else ""
    return (many, x.element_size()) if fused else ("drawn" if drawn else "best"), calls


class _Cut(NamedTuple):
    """How a vocabulary is divided: into so many parts, of so many tiles each; parts in a strip."""

    parts: int
    tiles: int
    strip: int


def _cut(
    device: torch.device, rows: int, programs: int, tiles: int, block_v: int, fused: bool, in_strips: bool
) -> _Cut:
    """Divide a vocabulary of so many tiles. The parts are a power of two, for which the kernels are compiled."""
    fit = max(1, STRIP_BYTES // (4 * rows * block_v)) if in_strips else tiles  # tiles that a strip may have
    strips = _power(triton.cdiv(tiles, fit))
    each, most = (FUSED_EACH, FUSED_MOST_PARTS) if fused else (EACH, MOST_PARTS)
    parts = strips * splits(device, programs, min(most, triton.cdiv(tiles, strips)), each=each)
    of_part = triton.cdiv(tiles, parts)
    return _Cut(parts, of_part, max(1, fit // of_part))


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


# A mask that may not be chosen, as LLaDA has it; its vocabulary and hidden size are multiples of 16.
_MASK, _VOCABULARY, _SIZE = 126336, 126464, 4096


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch: of logits, by all rules; fused, the plainest and the fullest; and their merges."""
    merges = set()
    for name, function, regime, launch, sample in _samples(arch):
        # The launches of further strips are like the first.
        first, *_, merge = calls_of(arch, regime, launch, function, *sample)
        expect = ("tensor core", "async copy") if function is by_kernel else ()
        yield Case(name, first, expect)
        known = merge.arguments["C"]
        kind = f"{known.PARTS.value} {known.RULE.value} {'drawn' if known.KEYS.value else 'best'}"
        kind += " +entropy" if merge.arguments["entropy_out"] is not None else ""
        if kind not in merges:
            merges.add(kind)
            yield Case(f"choose_token merge of {kind}", merge)


def _samples(arch: str) -> Iterator[tuple[str, Any, Any, Launch, tuple[Any, ...]]]:
    """Name, function, regime, launch, and the arguments of a choice."""
    for regime, launch in TABLE.on(arch):
        # A few rows, for which the vocabulary is divided, and many.
        for number, rows in (("bf16", 5), ("fp32", 1001)):
            for rule, entropy in product(RULES, (False, True)):
                choice, keys = _sample(rule, regime == "drawn", rows, entropy)
                sample = meta(rows, _VOCABULARY, dtype=number), choice, keys
                name = f"choose_token {regime} {rule}{' +entropy' * entropy} {number}"
                yield name, choose_token, regime, launch, sample
        # Without a bias strips are logits in float32 as above.
        if arch.startswith("sm_") and WIDE_PRODUCT:
            choice, keys = _sample("entropy", regime == "drawn", 1001)
            sample = (meta(1001, _SIZE), meta(_VOCABULARY, _SIZE), choice, meta(_VOCABULARY), keys, Workspace())
            yield f"choose_token_fused strips {regime} entropy bf16", by_strips, regime, launch, sample
    for regime, launch in FUSED_TABLE.on(arch):
        many, number = regime[0], "bf16" if regime[1] == 2 else "fp32"
        rows, eight = 15 if many.startswith("few") else 1001, many.endswith("int8")
        for (rule, full), entropy in product((("probability", False), ("margin", True)), (False, True)):
            size = _SIZE + 16 if full else _SIZE
            choice, keys = _sample(rule, full, rows, entropy)
            bias = meta(_VOCABULARY, dtype=number) if full else None
            head = meta(_VOCABULARY, size, dtype=torch.int8 if eight else number)
            sample = meta(rows, size, dtype=number), head, choice, bias, keys, Workspace()
            name = f"choose_token_fused {many} {rule}{' +entropy' * entropy} {number}"
            yield name, by_kernel, regime, launch, (*sample, meta(_VOCABULARY, dtype="fp32") if eight else None)


def _sample(rule: str, drawn: bool, rows: int, entropy: bool = False) -> tuple[Choice, Tensor | None]:
    heat = {"temperature": 0.7, "confidence_temperature": 0.7} if drawn else {}
    return Choice(rule, banned=(_MASK,), entropy=entropy, **heat), meta(rows, 3, dtype=torch.int64) if drawn else None
