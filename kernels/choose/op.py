"""`choose_token` and `choose_token_fused`: their arguments, and their checks."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dkv.kernels.choose import reference
from dkv.kernels.choose.choice import Choice
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, of_scales
from dkv.kernels.common.operation import Operation, recorded
from dkv.kernels.common.workspace import Workspace

BEST = Choice()


def _fake(x, choice):
    wide = torch.promote_types(x.dtype, torch.float32)
    entropy = x.new_empty(len(x), dtype=wide) if choice.entropy else None
    return x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=wide), entropy


CHOOSE = Operation(reference.choose_token, lambda logits, choice, *_: _fake(logits, choice), gradient=False)
CHOOSE_FUSED = Operation(
    reference.choose_token_fused, lambda hidden, weight, choice, *_: _fake(hidden, choice), gradient=False
)


def choose_token(
    logits: Tensor,
    choice: Choice = BEST,
    *,
    row_keys: Tensor | None = None,
    overwrite: bool = False,
    return_entropy: bool = False,
    workspace: Workspace | None = None,
    validate: bool = True,
    **settings: Any,
) -> tuple[Tensor, ...]:
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
        return_entropy: also return the entropy; the field `entropy` of `choice` does the same.
        workspace: scratch to use again between calls.
        validate: check for NaN and for rows without a candidate.
        settings: fields of `Choice`, which replace those of `choice`.

    Returns:
        token [R] int64 and log-confidence [R], float32 (float64 for float64). Ties go to the lowest id. With
        `return_entropy` also the entropy [R] in nats, of that dtype and at least 0: of the whole distribution that the
        confidence is of, that is at its temperature, without ids that filters drop, and with those that are banned.
        It keeps the digits of values near 0, too.

    Raises:
        ValueError: an argument is out of range, the logits hold NaN or no candidate, or a gradient is
            asked for: there is none, so call it under `torch.no_grad()` or on detached tensors.
    """
    r, v = checks.shape("logits", logits, None, None)
    checks.dtype("logits", logits, FLOATS)
    choice = _checked(choice, settings, return_entropy, v)
    row_keys = _row_keys(row_keys, r, choice, logits)
    return _valid(CHOOSE(logits, choice, row_keys, overwrite=overwrite, workspace=workspace), choice, validate)


def choose_token_fused(
    hidden: Tensor,
    head_weight: Any,
    choice: Choice = BEST,
    *,
    head_bias: Tensor | None = None,
    head_scales: Tensor | None = None,
    row_keys: Tensor | None = None,
    return_entropy: bool = False,
    workspace: Workspace | None = None,
    validate: bool = True,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """`choose_token` of `hidden @ head_weight.T + head_bias`; no more than a scratch of logits is held.

    The Triton backend adds up half-precision products in float32 without rounding the logits to the dtype of
    `hidden`. For few rows it holds no logits at all; for many, a strip of the vocabulary of them, from PyTorch's
    product. With top-k, top-p or confidence_dtype="model", for which logits are rounded, it leaves the work to
    PyTorch.

    Args:
        hidden: [R, d].
        head_weight: [V, d], dtype of hidden; any strides. Or a layer that gives its logits strip by strip:
            with `in_features`, `out_features` and `strips(hidden)`, an iterator of [R, C].
        head_bias: [V], dtype of hidden, or None; not with a layer.
        head_scales: [V], float32, with a head_weight of int8: the head is whole numbers with a scale for each id, as
            `int8_linear` has it. The Triton backend then multiplies in its kernel for any number of rows.

    The other arguments, the result and the errors are those of `choose_token`.
    """
    r, d = checks.shape("hidden", hidden, None, None)
    checks.dtype("hidden", hidden, FLOATS)
    if isinstance(head_weight, Tensor):
        checks.shape("head_weight", head_weight, None, d)
        v = len(head_weight)
        _check_scales(hidden, head_weight, head_scales)
        checks.same_device(hidden=hidden, head_weight=head_weight, head_bias=head_bias, head_scales=head_scales)
        if head_bias is not None:
            checks.shape("head_bias", head_bias, v)
            checks.same_dtype(hidden=hidden, head_bias=head_bias)
    else:
        checks.shape("hidden", hidden, r, head_weight.in_features)
        v = head_weight.out_features
        if head_bias is not None:
            raise ValueError("head_bias goes with a head_weight that is a tensor: a layer adds its own")
        if head_scales is not None:
            raise ValueError("head_scales goes with a head_weight that is a tensor: a layer scales its logits itself")
    choice = _checked(choice, settings, return_entropy, v)
    row_keys = _row_keys(row_keys, r, choice, hidden)
    if recorded(hidden) and not isinstance(head_weight, Tensor):
        chosen = CHOOSE(head_weight(hidden), choice, row_keys)  # a custom op takes no layer
    else:
        chosen = CHOOSE_FUSED(hidden, head_weight, choice, head_bias, head_scales, row_keys, workspace=workspace)
    return _valid(chosen, choice, validate)


def _check_scales(hidden: Tensor, weight: Tensor, scales: Tensor | None) -> None:
    """A head of int8 has scales, and every other one the dtype of the hidden states and none."""
    if weight.dtype != torch.int8:
        checks.same_dtype(hidden=hidden, head_weight=weight)
        if scales is not None:
            raise ValueError(
                f"head_scales goes with a head_weight of int8, and this one is {weight.dtype}: leave it out"
            )
    elif scales is None:
        raise ValueError("a head_weight of int8 needs head_scales, a scale for each id")
    else:
        checks.shape("head_scales", scales, len(weight))
        checks.dtype("head_scales", scales, of_scales(hidden))


def _checked(choice: Choice, settings: dict[str, Any], return_entropy: bool, vocabulary: int) -> Choice:
    choice = replace(choice, **{"entropy": choice.entropy or return_entropy} | settings)
    choice.check(vocabulary)
    return choice


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


def _valid(chosen: tuple[Tensor, Tensor, Tensor | None], choice: Choice, validate: bool) -> tuple[Tensor, ...]:
    if validate and bool(chosen[1].isnan().any()):
        row = int(chosen[1].isnan().nonzero()[0])
        raise ValueError(f"logits of row {row} hold NaN or +inf, or no id that may be chosen")
    return chosen if choice.entropy else chosen[:2]
