"""`choose_token` and `choose_token_fused`: their arguments, their checks, and their custom ops."""

from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor, library

from dkv.kernels.choose.choice import Choice
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS
from dkv.kernels.common.operation import Operation
from dkv.kernels.common.workspace import Workspace

BEST = Choice()
# The fields of a `Choice`, as `astuple` gives them.
SETTINGS = """str rule, float temperature, float confidence_temperature, str confidence_dtype, int? top_k, float? top_p,
    int[] banned, int? vocab_limit"""


@library.custom_op(
    "dkv::choose_token", mutates_args=(), schema=f"(Tensor logits, Tensor? row_keys, {SETTINGS}) -> (Tensor, Tensor)"
)
def _recorded(logits, row_keys, *settings):
    return CHOOSE.current(logits)(logits, Choice(*settings), row_keys)


@library.custom_op(
    "dkv::choose_token_fused",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor head_weight, Tensor? head_bias, Tensor? row_keys, {SETTINGS}) -> (Tensor, Tensor)",
)
def _recorded_fused(hidden, head_weight, head_bias, row_keys, *settings):
    return CHOOSE_FUSED.current(hidden)(hidden, head_weight, Choice(*settings), head_bias, row_keys)


@_recorded.register_fake
@_recorded_fused.register_fake
def _(x, *_):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=wide)


def _record(logits, choice, row_keys, overwrite, workspace):
    return _recorded(logits, row_keys, *astuple(choice))


def _record_fused(hidden, head_weight, choice, head_bias, row_keys, workspace):
    if not isinstance(head_weight, Tensor):
        return _recorded(head_weight(hidden), row_keys, *astuple(choice))
    return _recorded_fused(hidden, head_weight, head_bias, row_keys, *astuple(choice))


CHOOSE = Operation("choose", "choose_token", _record, with_gradient=None)
CHOOSE_FUSED = Operation("choose", "choose_token_fused", _record_fused, with_gradient=None)


def choose_token(
    logits: Tensor,
    choice: Choice = BEST,
    *,
    row_keys: Tensor | None = None,
    overwrite: bool = False,
    workspace: Workspace | None = None,
    validate: bool = True,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """The token of every row, and how sure the model is of it.

    The confidence is a logarithm taken from the tail, log p = -log1p(sum over the others of
    exp(x - max)), so that probabilities that differ only in how close to 1 they are stay apart in
    float32 as they do in the published float64 softmax. Banned ids and those beyond the limit
    cannot be chosen, but keep their share of the probability, as in the published code: NaN there is
    NaN. Logits are divided by a temperature after the largest of a row is subtracted, so that none overflows.

    Args:
        logits: [R, V], V at least 1; half precision is computed in float32.
        choice: how the token is chosen.
        row_keys: [R, K] int64 (default: the row number): the noise of a row is a function of these and of nothing else.
        overwrite: the logits may be destroyed, which saves a copy of them.
        workspace: scratch to use again between calls.
        validate: check for NaN and for rows without a candidate.
        settings: fields of `Choice`, which replace those of `choice`.

    Returns:
        token [R] int64 and log-confidence [R], float32 (float64 for float64). Ties go to the lowest id.

    Raises:
        ValueError: an argument is out of range, the logits hold NaN or no candidate, or a gradient is
            asked for: there is none, so call it under `torch.no_grad()` or on detached tensors.
    """
    r, v = checks.shape("logits", logits, None, None)
    checks.dtype("logits", logits, FLOATS)
    choice = replace(choice, **settings)
    choice.check(v)
    row_keys = _row_keys(row_keys, r, choice, logits)
    return _valid(CHOOSE(logits, choice, row_keys, overwrite, workspace), validate)


def choose_token_fused(
    hidden: Tensor,
    head_weight: Any,
    choice: Choice = BEST,
    *,
    head_bias: Tensor | None = None,
    row_keys: Tensor | None = None,
    workspace: Workspace | None = None,
    validate: bool = True,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """`choose_token` of `hidden @ head_weight.T + head_bias`; no more than a scratch of logits is held.

    The Triton kernel holds no logits at all, and adds up half-precision products in float32 without
    rounding the logits to the dtype of `hidden`. With top-k, top-p or confidence_dtype="model", for which logits
    are rounded, it leaves the work to PyTorch.

    Args:
        hidden: [R, d].
        head_weight: [V, d], dtype of hidden; any strides. Or a layer that gives its logits strip by strip:
            with `in_features`, `out_features` and `strips(hidden)`, an iterator of [R, C].
        head_bias: [V], dtype of hidden, or None; not with a layer.

    The other arguments, the result and the errors are those of `choose_token`.
    """
    r, d = checks.shape("hidden", hidden, None, None)
    checks.dtype("hidden", hidden, FLOATS)
    if isinstance(head_weight, Tensor):
        checks.shape("head_weight", head_weight, None, d)
        v = len(head_weight)
        checks.same_dtype(hidden=hidden, head_weight=head_weight)
        checks.same_device(hidden=hidden, head_weight=head_weight, head_bias=head_bias)
        if head_bias is not None:
            checks.shape("head_bias", head_bias, v)
            checks.same_dtype(hidden=hidden, head_bias=head_bias)
    else:
        checks.shape("hidden", hidden, r, head_weight.in_features)
        v = head_weight.out_features
        if head_bias is not None:
            raise ValueError("head_bias goes with a head_weight that is a tensor: a layer adds its own")
    choice = replace(choice, **settings)
    choice.check(v)
    row_keys = _row_keys(row_keys, r, choice, hidden)
    return _valid(CHOOSE_FUSED(hidden, head_weight, choice, head_bias, row_keys, workspace), validate)


def _row_keys(row_keys: Tensor | None, rows: int, choice: Choice, like: Tensor) -> Tensor | None:
    if choice.temperature == 0:
        return None
    if row_keys is None:
        return torch.arange(rows, device=like.device).unsqueeze(1)
    checks.shape("row_keys", row_keys, rows, None)
    if row_keys.shape[1] == 0:
        raise ValueError("row_keys must have at least one column")
    checks.dtype("row_keys", row_keys, (torch.int64,))
    checks.same_device(logits=like, row_keys=row_keys)
    return row_keys


def _valid(choice: tuple[Tensor, Tensor], validate: bool) -> tuple[Tensor, Tensor]:
    if validate and bool(choice[1].isnan().any()):
        row = int(choice[1].isnan().nonzero()[0])
        raise ValueError(f"logits of row {row} hold NaN or +inf, or no id that may be chosen")
    return choice
