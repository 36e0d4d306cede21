"""The choice of a token and its confidence, from logits or fused with the LM head, in Triton.

The vocabulary is divided among several programs; each passes once over its columns and leaves the
state of its rows (see `choice_state`), which a second kernel merges. Logits in float32 live in
registers alone.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from dkv.kernels import reference, torch_backend
from dkv.kernels.choose import RULES
from dkv.kernels.triton_backend import choice_state
from dkv.kernels.triton_backend.cases import Case, case
from dkv.kernels.triton_backend.choice_state import absorb, fresh, row_hash, store
from dkv.kernels.triton_backend.launch import (
    Launch,
    LaunchTable,
    batch_invariant,
    computable,
    power_of_two,
    precision,
    splits,
    strides,
)
from dkv.kernels.workspace import Workspace


@triton.jit(do_not_specialize=["seed_a", "seed_b"])
def _logits_kernel(
    logits, row_keys, floats, ids, rows, vocabulary, limit, tiles, temperature, scale, noise_scale, seed_a,
    seed_b, stride_r, stride_v, stride_kr, stride_kk,
    RULE: tl.constexpr, BANNED: tl.constexpr, KEYS: tl.constexpr, TEMPERED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state of a tile of rows over one part of the vocabulary, `tiles` tiles; grid (tiles of rows, PARTS)."""
    r, part = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1)
    inside = r < rows
    a, b = row_hash(row_keys, r, inside, seed_a, seed_b, stride_kr, stride_kk, KEYS)
    state = fresh(RULE, BLOCK_R)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(vocabulary, BLOCK_V))):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)  # [V]
        at = logits + r[:, None] * stride_r + column.to(tl.int64)[None, :] * stride_v
        seen = inside[:, None] & (column < vocabulary)[None, :]
        x = tl.load(at, mask=seen, other=float("-inf")).to(tl.float32)  # [R, V]
        state = absorb(state, x, column, limit, temperature, scale, noise_scale, a, b, RULE, BANNED, KEYS > 0, TEMPERED)
    store(state, floats, ids, r, inside, part, PARTS, KEYS > 0)


@triton.jit(do_not_specialize=["seed_a", "seed_b"])
def _hidden_kernel(
    hidden, weight, bias, row_keys, floats, ids, rows, vocabulary, size, limit, tiles, temperature, scale,
    noise_scale, seed_a, seed_b, stride_hr, stride_hd, stride_wv, stride_wd, stride_b, stride_kr, stride_kk,
    RULE: tl.constexpr, BANNED: tl.constexpr, KEYS: tl.constexpr, TEMPERED: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_logits_kernel` of hidden @ weight.T + bias; EVEN: size is a multiple of BLOCK_D."""
    r, part = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1)
    inside = r < rows
    a, b = row_hash(row_keys, r, inside, seed_a, seed_b, stride_kr, stride_kk, KEYS)
    d = tl.arange(0, BLOCK_D)
    far_d = d.to(tl.int64)
    state = fresh(RULE, BLOCK_R)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(vocabulary, BLOCK_V))):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)  # [V]
        known = column < vocabulary
        hidden_at = hidden + r[:, None] * stride_hr + far_d[None, :] * stride_hd  # [R, D]
        weight_at = weight + column.to(tl.int64)[None, :] * stride_wv + far_d[:, None] * stride_wd  # [D, V]
        x = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        for start in tl.range(0, size, BLOCK_D, num_stages=STAGES):
            of_rows, of_ids = inside[:, None], known[None, :]
            if not EVEN:
                of_rows, of_ids = of_rows & (d < size - start)[None, :], of_ids & (d < size - start)[:, None]
            h, w = tl.load(hidden_at, mask=of_rows, other=0.0), tl.load(weight_at, mask=of_ids, other=0.0)
            x = tl.dot(h, w, x, input_precision=PRECISION)
            hidden_at += BLOCK_D * stride_hd
            weight_at += BLOCK_D * stride_wd
        if bias is not None:
            x += tl.load(bias + column.to(tl.int64) * stride_b, mask=known, other=0.0).to(tl.float32)[None, :]
        x = tl.where(known[None, :], x, float("-inf"))
        state = absorb(state, x, column, limit, temperature, scale, noise_scale, a, b, RULE, BANNED, KEYS > 0, TEMPERED)
    store(state, floats, ids, r, inside, part, PARTS, KEYS > 0)


# Tile: (rows, ids). Regime: the best id, or one that is drawn.
TABLE = LaunchTable(
    "choose_token",
    {
        "default": {regime: Launch((1, 2048), 8) for regime in ("best", "drawn")},
        "interpreter": {regime: Launch((256, 4096), 4) for regime in ("best", "drawn")},
    },
    tuple(Launch((1, block_v), warps) for block_v, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16))),
)
# Tile: (rows, ids, numbers of a hidden state). Regime: how many rows ("few" up to 16) and bytes of a number.
FUSED_TABLE = LaunchTable(
    "choose_token_fused",
    {
        "default": {
            ("few", 2): Launch((16, 64, 64), 8, 3),
            ("few", 4): Launch((16, 64, 32), 4, 4),
            ("many", 2): Launch((64, 128, 64), 8, 2),
            ("many", 4): Launch((64, 64, 32), 8, 2),
        },
        "sm_90": {("few", 2): Launch((16, 128, 64), 8, 4), ("many", 2): Launch((64, 128, 64), 8, 3)},
        "sm_100": {("few", 2): Launch((16, 128, 64), 8, 4), ("many", 2): Launch((64, 128, 64), 8, 3)},
        "interpreter": {
            (many, width): Launch((block_r, 1024, 64), 4)
            for many, block_r in (("few", 16), ("many", 64)) for width in (2, 4)
        },
    },
    tuple(
        Launch((block_r, block_v, block_d), warps, stages)
        for block_r in (16, 64, 128) for block_v in (64, 128) for block_d in (32, 64, 128)
        for warps in (4, 8) for stages in (2, 3, 4)
    ),
)  # fmt: skip
# Programs of a processor at a time, and the most parts of a vocabulary.
EACH, MOST_PARTS = 4, 64
FUSED_EACH, FUSED_MOST_PARTS = 2, 256


def choose_token(
    logits, *, top_k=None, top_p=None, confidence_dtype="exact", overwrite=False, workspace=None, parts=None, row=None,
    **how,
):  # fmt: skip
    """`dkv.kernels.choose_token`; `parts` fixes in how many parts the vocabulary is divided, `row` the launch.

    top-k and top-p need the ids in order, and confidences in the dtype of the logits a softmax that is rounded in the
    middle, which one pass does not give: PyTorch chooses with them.
    """
    rows, vocabulary = logits.shape
    if _needs_rows(vocabulary, top_k, top_p, confidence_dtype):
        return torch_backend.choose_token(
            logits, top_k=top_k, top_p=top_p, confidence_dtype=confidence_dtype, overwrite=overwrite,
            workspace=workspace, **how,
        )  # fmt: skip
    logits = computable(logits)

    def start(grid, row, shared):
        _logits_kernel[grid](logits, stride_r=logits.stride(0), stride_v=logits.stride(1), **shared)

    def fit(row):
        return min(row.tile[0], power_of_two(rows)), min(row.tile[1], max(16, power_of_two(vocabulary)))

    regime = "drawn" if how["temperature"] > 0 else "best"
    return _choose(TABLE, regime, start, fit, rows, vocabulary, EACH, MOST_PARTS, logits, workspace, parts, row, **how)


def choose_token_fused(
    hidden, head_weight, *, head_bias=None, top_k=None, top_p=None, confidence_dtype="exact", workspace=None,
    parts=None, row=None, **how,
):  # fmt: skip
    """`dkv.kernels.choose_token_fused`; `parts`, `row` and what is left to PyTorch as in `choose_token`."""
    rounding = {"top_k": top_k, "top_p": top_p, "confidence_dtype": confidence_dtype}
    if not isinstance(head_weight, torch.Tensor):
        return choose_token(head_weight(hidden), workspace=workspace, **rounding, **how)
    (rows, size), vocabulary = hidden.shape, len(head_weight)
    if _needs_rows(vocabulary, **rounding):
        return torch_backend.choose_token_fused(
            hidden, head_weight, head_bias=head_bias, workspace=workspace, **rounding, **how
        )
    hidden, weight = computable(hidden), computable(head_weight)
    bias = None if head_bias is None else computable(head_bias)
    stride_b, (stride_hr, stride_hd), (stride_wv, stride_wd) = *strides(bias, 1), hidden.stride(), weight.stride()

    def start(grid, row, shared):
        _hidden_kernel[grid](
            hidden, weight, bias, size=size, stride_hr=stride_hr, stride_hd=stride_hd, stride_wv=stride_wv,
            stride_wd=stride_wd, stride_b=stride_b, EVEN=size % row.tile[2] == 0, PRECISION=precision(hidden),
            BLOCK_D=row.tile[2], STAGES=row.stages, **shared,
        )  # fmt: skip

    # A larger tile adds in another order, so that of a single row serves all where the company must not count.
    regime = ("few" if rows <= 16 or batch_invariant() else "many", hidden.element_size())
    return _choose(
        FUSED_TABLE, regime, start, lambda row: row.tile[:2], rows, vocabulary, FUSED_EACH, FUSED_MOST_PARTS, hidden,
        workspace, parts, row, **how,
    )  # fmt: skip


def _needs_rows(vocabulary: int, top_k: int | None, top_p: float | None, confidence_dtype: str) -> bool:
    return (
        confidence_dtype != "exact" or (top_k is not None and top_k < vocabulary) or (top_p is not None and top_p < 1)
    )


def _choose(
    table, regime, start, fit, rows, vocabulary, each, most, like, workspace, parts, row,
    *, rule, temperature, confidence_temperature, seed, row_keys=None, banned, vocab_limit,
):  # fmt: skip
    """`start` the kernel of a form on a grid, with a row and the arguments that both have; then merge."""
    device = like.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    confidence = torch.empty(rows, dtype=torch.float32, device=device)
    work = Workspace() if workspace is None else workspace
    row_keys = row_keys if temperature > 0 else None
    seed_a, seed_b = choice_state.seed_halves(seed)
    heat, tempered = reference.computable(confidence_temperature, torch.float32), confidence_temperature != 1
    scale, noise_scale = reference.shares(temperature, torch.float32) if temperature > 0 else (0.0, 0.0)

    def run(row: Launch) -> None:
        block_r, block_v = fit(row)
        row_tiles, tiles = triton.cdiv(rows, block_r), triton.cdiv(vocabulary, block_v)
        split = parts or splits(device, row_tiles, row_tiles, min(most, tiles), each=each)
        states = choice_state.scratch(work, rows, split, device)
        shared = states | {
            "row_keys": row_keys, "rows": rows, "vocabulary": vocabulary,
            "limit": vocabulary if vocab_limit is None else vocab_limit, "tiles": triton.cdiv(tiles, split),
            "temperature": heat, "scale": scale, "noise_scale": noise_scale, "seed_a": seed_a, "seed_b": seed_b,
            "KEYS": 0 if row_keys is None else row_keys.shape[1],
            "RULE": rule, "BANNED": banned, "TEMPERED": tempered, "PARTS": split,
            "BLOCK_R": block_r, "BLOCK_V": block_v, "num_warps": row.warps, "num_stages": row.stages,
        }  # fmt: skip
        shared["stride_kr"], shared["stride_kk"] = strides(row_keys, 2)
        start((row_tiles, split), row, shared)
        choice_state.merge(states, token, confidence, rule, row_keys is not None, split, heat, tempered)

    if rows:
        table.start(device, regime, run, row)
    return token, confidence


def audit_cases(arch: str) -> Iterator[Case]:
    """Every row: of logits, by all rules; fused, the plainest and the fullest; and the merge."""
    for regime, row in TABLE.on(arch):
        for dtype in ("bf16", "fp32"):
            for rule in RULES:
                constants = {"stride_v": 1, "BLOCK_R": row.tile[0], "BLOCK_V": row.tile[1]}
                yield _case(
                    f"choose_token {regime} {rule} {dtype}", _logits_kernel, row, {"logits": f"*{dtype}"}, constants,
                    rule, regime == "drawn",
                )  # fmt: skip
    for (many, width), row in FUSED_TABLE.on(arch):
        dtype, nvidia = "bf16" if width == 2 else "fp32", arch.startswith("sm_")
        for rule, full in (("probability", False), ("margin", True), ("entropy", True)):
            constants = {
                "stride_hd": 1, "stride_wd": 1, "stride_b": 1, "EVEN": not full,
                "PRECISION": "tf32x3" if width == 4 and nvidia else "ieee",
                "BLOCK_R": row.tile[0], "BLOCK_V": row.tile[1], "BLOCK_D": row.tile[2], "STAGES": row.stages,
            }  # fmt: skip
            if not full:
                constants |= {"bias": None, "stride_b": 0}
            yield _case(
                f"choose_token_fused {many} {rule} {dtype}", _hidden_kernel, row,
                dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}"), constants, rule, full,
                ("tensor core", "async copy") if nvidia else ("tensor core",),
            )  # fmt: skip
    for parts in (1, FUSED_MOST_PARTS):
        yield from choice_state.merge_cases(parts)


def _case(name, kernel, row, types, constants, rule, noise, expect=()) -> Case:
    types = types | {"floats": "*fp32", "ids": "*i32", "row_keys": "*i64", "temperature": "fp32"}
    types |= {"scale": "fp32", "noise_scale": "fp32"}
    constants = constants | {"RULE": rule, "BANNED": (126336,), "TEMPERED": noise, "PARTS": MOST_PARTS}
    constants |= {"KEYS": 3, "stride_kk": 1} if noise else {"KEYS": 0, "row_keys": None, "stride_kr": 0, "stride_kk": 0}
    plain = case(name, kernel, row, types, constants, loose=("stride_kr",), expect=expect)
    # Vocabularies and hidden sizes are multiples of 16, and so a mask that they bound does not split a load.
    multiples = (n for n in ("vocabulary", "size") if n in plain.arguments)
    return replace(plain, aligned=(*plain.aligned, *multiples))
