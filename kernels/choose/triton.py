"""The choice of a token and its confidence, from logits or fused with the LM head, in Triton.

The vocabulary is divided among several programs; each passes once over its columns and leaves the
state of its rows (see `kernel`), which a second kernel merges. Logits in float32 live in registers alone.
top-k and top-p need the ids in order, and confidences in the dtype of the logits a softmax that is rounded in the
middle, which one pass does not give: PyTorch chooses with them.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from dkv.kernels.choose import torch as fallback
from dkv.kernels.choose.choice import RULES, Choice
from dkv.kernels.choose.kernel import FLOATS, IDS, choose_kernel, merge_kernel
from dkv.kernels.choose.temperature import computable as computable_temperature
from dkv.kernels.choose.temperature import shares
from dkv.kernels.common.arguments import computable, constants, precision, strided
from dkv.kernels.common.launch import Call, Launch, LaunchTable, batch_invariant, splits
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
_ROWS = {"few": 16, "many": 64}
# Tile: (rows, ids, numbers of a hidden state). Regime: how many rows ("few" up to 16) and bytes of a number.
FUSED_TABLE = LaunchTable(
    "choose_token_fused",
    {
        "default": {
            ("few", 2): Launch((16, 64, 64), 8, 3),
            ("few", 4): Launch((16, 64, 32), 4, 4),
            ("many", 2): Launch((64, 128, 64), 8, 2),
            ("many", 4): Launch((64, 32, 32), 8, 2),
        },
        "sm_80": {("many", 4): Launch((64, 64, 32), 8, 2)},
        "sm_90": {
            ("few", 2): Launch((16, 128, 64), 8, 4),
            ("many", 2): Launch((64, 128, 64), 8, 3),
            ("many", 4): Launch((64, 64, 32), 8, 2),
        },
        # Twice as many ids at a time leave no register free when tokens are drawn: counted by
        # ptxas, not timed.
        "sm_100": {("few", 2): Launch((16, 64, 128), 8, 3), ("many", 2): Launch((64, 128, 64), 8, 3)},
        "gfx942": {("many", 4): Launch((64, 64, 32), 8, 2)},
        "interpreter": {regime: Launch((_ROWS[regime[0]], 1024, 64), 4) for regime in product(_ROWS, (2, 4))},
    },
    [
        Launch(tile, warps, stages)
        for tile in product((16, 64, 128), (64, 128), (32, 64, 128))
        for warps, stages in product((4, 8), (2, 3, 4))
    ],
)
# States in a tile of the merge: as many rows as fit beside the parts.
MERGE = Launch((1024,), 4)
# Programs of a processor at a time, and the most parts of a vocabulary: of logits, and fused.
EACH, MOST_PARTS = 4, 64
FUSED_EACH, FUSED_MOST_PARTS = 2, 256


def choose_token(logits, choice: Choice, row_keys, *, overwrite=False, workspace=None) -> tuple[Tensor, Tensor]:
    if choice.confidence_dtype != "exact" or choice.filters(logits.shape[1]):
        return fallback.choose_token(logits, choice, row_keys, overwrite=overwrite, workspace=workspace)
    return _choose(logits, None, None, choice, row_keys, workspace or Workspace())


def choose_token_fused(hidden, head_weight, choice: Choice, head_bias, row_keys, *, workspace=None):
    if not isinstance(head_weight, Tensor):
        return choose_token(head_weight(hidden), choice, row_keys, workspace=workspace)
    if choice.confidence_dtype != "exact" or choice.filters(len(head_weight)):
        return fallback.choose_token_fused(hidden, head_weight, choice, head_bias, row_keys, workspace=workspace)
    return _choose(hidden, head_weight, head_bias, choice, row_keys, workspace or Workspace())


def _choose(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, choice: Choice, row_keys: Tensor | None, work: Workspace
) -> tuple[Tensor, Tensor]:
    """Choose by logits x [R, V], or by x @ weight.T + bias."""
    x, weight, bias = (tensor if tensor is None else computable(tensor) for tensor in (x, weight, bias))
    (rows, size), vocabulary, drawn = x.shape, x.shape[1] if weight is None else len(weight), choice.temperature > 0
    token = torch.empty(rows, dtype=torch.int64, device=x.device)
    confidence = torch.empty(rows, dtype=torch.float32, device=x.device)
    heat = computable_temperature(choice.confidence_temperature, torch.float32)
    heat = (heat, *(shares(choice.temperature, torch.float32) if drawn else (0.0, 0.0)))
    own = {"x": x, "weight": weight, "bias": bias, "row_keys": row_keys if drawn else None}
    own = {name: strided(tensor) for name, tensor in own.items()}
    own |= {"vocabulary": vocabulary, "size": size, "limit": choice.limit(vocabulary), "BANNED": choice.banned}
    rule = {"RULE": choice.rule, "TEMPERED": choice.confidence_temperature != 1}
    rule["KEYS"] = row_keys.shape[1] if drawn else 0

    def calls(launch: Launch) -> list[Call]:
        block_r, block_v, block_d = (*launch.tile, 1)[:3]
        if weight is None:
            block_r, block_v = min(block_r, _power(rows)), min(block_v, max(16, _power(vocabulary)))
        programs, tiles = triton.cdiv(rows, block_r), triton.cdiv(vocabulary, block_v)
        each, most = (EACH, MOST_PARTS) if weight is None else (FUSED_EACH, FUSED_MOST_PARTS)
        parts = splits(x.device, programs, programs, min(most, tiles), each=each)
        known = rule | {"PARTS": parts}
        shared = {
            "rows": rows,
            "heat": heat,
            "floats": work.take("choice", (rows, parts, FLOATS.value), torch.float32, x.device),
            "ids": work.take("choice", (rows, parts, IDS.value), torch.int32, x.device),
        }
        merged = {"token_out": token, "confidence_out": confidence, "C": constants(**known)}
        merged |= {"BLOCK_P": _power(parts), "BLOCK_R": max(1, MERGE.tile[0] // _power(parts))}
        merge = Call(merge_kernel, (triton.cdiv(rows, merged["BLOCK_R"]),), MERGE, shared | merged)
        known |= {"BLOCK_R": block_r, "BLOCK_V": block_v, "BLOCK_D": block_d, "EVEN": size % block_d == 0}
        known |= {"PRECISION": precision(x), "STAGES": launch.stages}
        arguments = shared | own | {"tiles": triton.cdiv(tiles, parts), "C": constants(**known)}
        return [Call(choose_kernel, (programs, parts), launch, arguments), merge]

    # With DKV_BATCH_INVARIANT=1 the small tile is used for any number of rows: another changes the order of the sums.
    many = "few" if rows <= 16 or batch_invariant() else "many"
    if rows and weight is None:
        TABLE.start(x.device, "drawn" if drawn else "best", calls)
    elif rows:
        FUSED_TABLE.start(x.device, (many, x.element_size()), calls)
    return token, confidence


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


# A mask that may not be chosen, as LLaDA has it; its vocabulary and hidden size are multiples of 16.
_MASK, _VOCABULARY, _SIZE = 126336, 126464, 4096


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch: of logits, by all rules; fused, the plainest and the fullest; and their merges."""
    merges = set()
    for name, table, regime, launch, sample in _samples(arch):
        function = choose_token if table is TABLE else choose_token_fused
        first, merge = calls_of(arch, regime, launch, function, *sample)
        expect = () if table is TABLE else ("tensor core", "async copy")
        yield Case(name, first, expect)
        known = merge.arguments["C"]
        kind = f"{known.PARTS.value} {known.RULE.value} {'drawn' if known.KEYS.value else 'best'}"
        if kind not in merges:
            merges.add(kind)
            yield Case(f"choose_token merge of {kind}", merge)


def _samples(arch: str) -> Iterator[tuple[str, Any, Any, Launch, tuple[Any, ...]]]:
    """Name, table, regime, launch, and the arguments of a choice."""
    for regime, launch in TABLE.on(arch):
        # A few rows, for which the vocabulary is divided, and many.
        for number, rows in (("bf16", 5), ("fp32", 1001)):
            for rule in RULES:
                sample = (meta(rows, _VOCABULARY, dtype=number), *_sample(rule, regime == "drawn", rows))
                yield f"choose_token {regime} {rule} {number}", TABLE, regime, launch, sample
    for regime, launch in FUSED_TABLE.on(arch):
        many, number = regime[0], "bf16" if regime[1] == 2 else "fp32"
        rows = 15 if many == "few" else 1001
        for rule, full in (("probability", False), ("margin", True), ("entropy", True)):
            size = _SIZE + 16 if full else _SIZE
            choice, keys = _sample(rule, full, rows)
            bias = meta(_VOCABULARY, dtype=number) if full else None
            head = meta(rows, size, dtype=number), meta(_VOCABULARY, size, dtype=number)
            yield f"choose_token_fused {many} {rule} {number}", FUSED_TABLE, regime, launch, (*head, choice, bias, keys)


def _sample(rule: str, drawn: bool, rows: int) -> tuple[Choice, Tensor | None]:
    heat = {"temperature": 0.7, "confidence_temperature": 0.7} if drawn else {}
    return Choice(rule, banned=(_MASK,), **heat), meta(rows, 3, dtype=torch.int64) if drawn else None
