"""The choice of a token and its confidence, from logits or fused with the LM head, in Triton.

The vocabulary is divided among several programs; each passes once over its columns and leaves the
state of its rows (see `kernel`), which a second kernel merges. Logits in float32 live in registers alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from dkv.kernels.choose import torch as fallback
from dkv.kernels.choose.choice import RULES, Choice
from dkv.kernels.choose.kernel import FLOATS, IDS, hidden_kernel, logits_kernel, merge_kernel
from dkv.kernels.choose.launch import (
    EACH,
    FUSED_EACH,
    FUSED_MOST_PARTS,
    FUSED_TABLE,
    MERGE,
    MOST_PARTS,
    TABLE,
)
from dkv.kernels.choose.temperature import computable as computable_temperature
from dkv.kernels.choose.temperature import shares
from dkv.kernels.common.launch import (
    Call,
    Launch,
    batch_invariant,
    computable,
    power_of_two,
    precision,
    splits,
    strides,
)
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.dev.cases import Case, calls_of, case, meta


def choose_token(
    logits, choice: Choice, row_keys=None, overwrite=False, workspace=None,
    *, parts: int | None = None, launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dkv.kernels.choose_token`; `parts` fixes in how many parts the vocabulary is divided, `launch` the launch.

    top-k and top-p need the ids in order, and confidences in the dtype of the logits a softmax that is rounded in the
    middle, which one pass does not give: PyTorch chooses with them.
    """
    rows, vocabulary = logits.shape
    if choice.confidence_dtype != "exact" or choice.filters(vocabulary):
        return fallback.choose_token(logits, choice, row_keys, overwrite, workspace)
    logits = computable(logits)
    outputs = _outputs(rows, logits.device)
    work = Workspace() if workspace is None else workspace

    def calls(launch: Launch) -> list[Call]:
        block_r = min(launch.tile[0], power_of_two(rows))
        block_v = min(launch.tile[1], max(16, power_of_two(vocabulary)))
        split = parts or _parts(logits.device, rows, vocabulary, (block_r, block_v), EACH, MOST_PARTS)
        own = {"logits": logits, **strides(**{"": (logits, "rv")})}
        shared = _shared(choice, row_keys, rows, vocabulary, (block_r, block_v), split, work, logits.device)
        return _both(logits_kernel, launch, own, shared, outputs)

    if rows:
        TABLE.start(logits.device, "drawn" if choice.temperature > 0 else "best", calls, launch)
    return outputs


def choose_token_fused(
    hidden, head_weight, choice: Choice, head_bias=None, row_keys=None, workspace=None,
    *, parts: int | None = None, launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dkv.kernels.choose_token_fused`; `parts`, `launch` and what is left to PyTorch as in `choose_token`."""
    if not isinstance(head_weight, Tensor):
        return choose_token(head_weight(hidden), choice, row_keys, False, workspace, parts=parts, launch=launch)
    (rows, size), vocabulary = hidden.shape, len(head_weight)
    if choice.confidence_dtype != "exact" or choice.filters(vocabulary):
        return fallback.choose_token_fused(hidden, head_weight, choice, head_bias, row_keys, workspace)
    hidden, weight = computable(hidden), computable(head_weight)
    bias = None if head_bias is None else computable(head_bias)
    outputs = _outputs(rows, hidden.device)
    work = Workspace() if workspace is None else workspace

    def calls(launch: Launch) -> list[Call]:
        block_r, block_v, block_d = launch.tile
        split = parts or _parts(hidden.device, rows, vocabulary, (block_r, block_v), FUSED_EACH, FUSED_MOST_PARTS)
        own = {
            "hidden": hidden, "weight": weight, "bias": bias, "size": size, "EVEN": size % block_d == 0,
            "PRECISION": precision(hidden), "BLOCK_D": block_d, "STAGES": launch.stages,
            **strides(h=(hidden, "rd"), w=(weight, "vd")), "stride_b": 0 if bias is None else bias.stride(0),
        }  # fmt: skip
        shared = _shared(choice, row_keys, rows, vocabulary, (block_r, block_v), split, work, hidden.device)
        return _both(hidden_kernel, launch, own, shared, outputs)

    # With DKV_BATCH_INVARIANT=1 the small tile is used for any number of rows: another changes the order of the sums.
    many = "few" if rows <= 16 or batch_invariant() else "many"
    if rows:
        FUSED_TABLE.start(hidden.device, (many, hidden.element_size()), calls, launch)
    return outputs


def _outputs(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token and confidence."""
    return torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.float32, device=device)


def _parts(device: torch.device, rows: int, vocabulary: int, tile: tuple[int, int], each: int, most: int) -> int:
    programs, tiles = triton.cdiv(rows, tile[0]), triton.cdiv(vocabulary, tile[1])
    return splits(device, programs, programs, min(most, tiles), each=each)


def _shared(
    choice: Choice, row_keys: Tensor | None, rows: int, vocabulary: int, tile: tuple[int, int], parts: int,
    work: Workspace, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that both forms of the kernel have."""
    drawn = choice.temperature > 0
    row_keys = row_keys if drawn else None
    scale, noise_scale = shares(choice.temperature, torch.float32) if drawn else (0.0, 0.0)
    return {
        "floats": work.take("choice", (rows, parts, FLOATS.value), torch.float32, device),
        "ids": work.take("choice", (rows, parts, IDS.value), torch.int32, device),
        "row_keys": row_keys, **strides(k=(row_keys, "rk")), "KEYS": 0 if row_keys is None else row_keys.shape[1],
        "rows": rows, "vocabulary": vocabulary, "limit": choice.limit(vocabulary),
        "tiles": triton.cdiv(triton.cdiv(vocabulary, tile[1]), parts), "scale": scale, "noise_scale": noise_scale,
        "temperature": computable_temperature(choice.confidence_temperature, torch.float32),
        "TEMPERED": choice.confidence_temperature != 1, "RULE": choice.rule, "BANNED": choice.banned, "PARTS": parts,
        "BLOCK_R": tile[0], "BLOCK_V": tile[1],
    }  # fmt: skip


def _both(kernel: Any, launch: Launch, own: dict, shared: dict, outputs: tuple[Tensor, Tensor]) -> list[Call]:
    """The pass over the vocabulary, and the merge of what its parts leave."""
    rows, parts = shared["rows"], shared["PARTS"]
    grid = triton.cdiv(rows, shared["BLOCK_R"]), parts
    block_p = power_of_two(parts)
    block_r = max(1, MERGE.tile[0] // block_p)
    merged = {name: shared[name] for name in ("floats", "ids", "rows", "temperature", "RULE", "TEMPERED", "PARTS")}
    merged |= {"token_out": outputs[0], "confidence_out": outputs[1], "NOISE": shared["KEYS"] > 0}
    merged |= {"BLOCK_P": block_p, "BLOCK_R": block_r}
    return [
        Call(kernel, grid, launch, own | shared),
        Call(merge_kernel, (triton.cdiv(rows, block_r),), MERGE, merged),
    ]


# A mask that may not be chosen, as LLaDA has it; its vocabulary and hidden size are multiples of 16.
_MASK, _VOCABULARY, _SIZE = 126336, 126464, 4096


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch: of logits, by all rules; fused, the plainest and the fullest; and their merges."""
    seen = []
    for name, regime, launch, run, expect in _samples(arch):
        first, merge = calls_of(arch, regime, launch, run)
        made = case(name, first, expect)
        parts, rule = merge.arguments["PARTS"], merge.arguments["RULE"]
        kind = "drawn" if merge.arguments["NOISE"] else "best"
        yield made
        if (parts, rule, kind) not in seen:
            seen.append((parts, rule, kind))
            yield case(f"choose_token merge of {parts} {rule} {kind}", merge)


def _samples(arch: str) -> Iterator[tuple[str, Any, Launch, Callable[[], Any], tuple[str, ...]]]:
    """Name, regime, launch, a call, and the instructions that its kernel must have."""
    for regime, launch in TABLE.on(arch):
        # A few rows, for which the vocabulary is divided, and many.
        for number, dtype, rows in (("bf16", torch.bfloat16, 5), ("fp32", torch.float32, 1001)):
            for rule in RULES:
                choice, keys = _sample(rule, regime == "drawn", rows)
                logits = meta(rows, _VOCABULARY, dtype=dtype)
                run = _later(choose_token, logits, choice, keys, launch=launch)
                yield f"choose_token {regime} {rule} {number}", regime, launch, run, ()
    for regime, launch in FUSED_TABLE.on(arch):
        many, width = regime
        number, dtype = ("bf16", torch.bfloat16) if width == 2 else ("fp32", torch.float32)
        expect = ("tensor core", "async copy") if arch.startswith("sm_") else ("tensor core",)
        for rule, full in (("probability", False), ("margin", True), ("entropy", True)):
            rows, size = (15 if many == "few" else 1001), (_SIZE + 16 if full else _SIZE)
            choice, keys = _sample(rule, full, rows)
            hidden, weight = meta(rows, size, dtype=dtype), meta(_VOCABULARY, size, dtype=dtype)
            bias = meta(_VOCABULARY, dtype=dtype) if full else None
            run = _later(choose_token_fused, hidden, weight, choice, bias, keys, launch=launch)
            yield f"choose_token_fused {many} {rule} {number}", regime, launch, run, expect


def _sample(rule: str, drawn: bool, rows: int) -> tuple[Choice, Tensor | None]:
    heat = {"temperature": 0.7, "confidence_temperature": 0.7} if drawn else {}
    return Choice(rule, banned=(_MASK,), **heat), meta(rows, 3, dtype=torch.int64) if drawn else None


def _later(function: Callable, *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*args, **options)
