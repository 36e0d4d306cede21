"""The choice of a token and its confidence, from logits or from hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dkv.kernels import checks, ops
from dkv.kernels.workspace import Workspace

RULES = ("probability", "margin", "entropy")
CONFIDENCE_DTYPES = ("exact", "model")


def choose_token(
    logits: Tensor,
    *,
    rule: str = "probability",
    temperature: float = 0.0,
    confidence_temperature: float = 1.0,
    confidence_dtype: str = "exact",
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    row_keys: Tensor | None = None,
    banned: Sequence[int] = (),
    vocab_limit: int | None = None,
    overwrite: bool = False,
    workspace: Workspace | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:
    """The token of every row, and how sure the model is of it.

    The confidence is a logarithm taken from the tail, log p = -log1p(sum over the others of
    exp(x - max)), so that probabilities that differ only in how close to 1 they are stay apart in
    float32 as they do in the published float64 softmax. Banned ids and those beyond the limit
    cannot be chosen, but keep their share of the probability, as in the published code: NaN there is
    NaN. Logits are divided by a temperature after the largest of a row is subtracted, so that none overflows.

    Args:
        logits: [R, V], V at least 1; half precision is computed in float32.
        rule: "probability" (log p of the token), "margin" (log of best minus second best) or
            "entropy" (sum of p log p).
        temperature: 0 takes the best id; above 0 the id is drawn from softmax(logits / temperature). A temperature
            so low that it does not tell logits apart takes the best id, of equal ones the lowest.
        confidence_temperature: divides the logits before filters and confidence: 1 as LLaDA does,
            the temperature as Dream does.
        confidence_dtype: "exact", or "model": logits are divided, filtered, softmaxed and compared in their own dtype
            and the confidence is the logarithm of a rounded number, as in the code that Dream published. In bfloat16
            many confidences are then equal.
        top_k, top_p: ids outside are neither drawn nor counted; the best allowed id always stays.
        seed, row_keys: integer and [R, K] int64 (default: the row number): the noise of a row is a
            function of these and of nothing else.
        banned: ids that must not be chosen, for instance the mask.
        vocab_limit: ids from here on must not be chosen (embeddings wider than the tokenizer).
        overwrite: the logits may be destroyed, which saves a copy of them.
        workspace: scratch to use again between calls.
        validate: check for NaN and for rows without a candidate.

    Returns:
        token [R] int64 and log-confidence [R], float32 (float64 for float64). Ties go to the lowest id.

    Raises:
        ValueError: an argument is out of range, the logits hold NaN or no candidate, or a gradient is
            asked for: there is none, so call it under `torch.no_grad()` or on detached tensors.
    """
    r, v = checks.shape("logits", logits, None, None)
    checks.dtype("logits", logits, checks.FLOATS)
    how = _choice(
        v, rule, temperature, confidence_temperature, confidence_dtype, top_k, top_p, seed, banned, vocab_limit
    )
    row_keys = _row_keys(row_keys, r, temperature, logits)
    choice = ops.run(
        "choose_token", logits, row_keys=row_keys, overwrite=overwrite, workspace=workspace, differentiable=False, **how
    )
    return _valid(choice, validate)


def choose_token_fused(
    hidden: Tensor,
    head_weight: Any,
    *,
    head_bias: Tensor | None = None,
    rule: str = "probability",
    temperature: float = 0.0,
    confidence_temperature: float = 1.0,
    confidence_dtype: str = "exact",
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    row_keys: Tensor | None = None,
    banned: Sequence[int] = (),
    vocab_limit: int | None = None,
    workspace: Workspace | None = None,
    validate: bool = True,
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
    checks.dtype("hidden", hidden, checks.FLOATS)
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
    how = _choice(
        v, rule, temperature, confidence_temperature, confidence_dtype, top_k, top_p, seed, banned, vocab_limit
    )
    row_keys = _row_keys(row_keys, r, temperature, hidden)
    choice = ops.run(
        "choose_token_fused", hidden, head_weight, head_bias=head_bias, row_keys=row_keys, workspace=workspace,
        differentiable=False, **how,
    )  # fmt: skip
    return _valid(choice, validate)


def _choice(
    vocabulary, rule, temperature, confidence_temperature, confidence_dtype, top_k, top_p, seed, banned, vocab_limit
):
    """The checked settings of a choice, all present."""
    if vocabulary == 0:
        raise ValueError("logits must have at least one id, got a vocabulary of 0")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or a positive number, got {temperature}")
    if not 0 < confidence_temperature < float("inf"):
        raise ValueError(f"confidence_temperature must be a positive number, got {confidence_temperature}")
    if confidence_dtype not in CONFIDENCE_DTYPES:
        raise ValueError(f"confidence_dtype must be one of {', '.join(CONFIDENCE_DTYPES)}, got {confidence_dtype!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be between 0 and 1 or None, got {top_p}")
    if vocab_limit is not None and not 1 <= vocab_limit <= vocabulary:
        raise ValueError(f"vocab_limit must be in 1..{vocabulary}, the size of the vocabulary, got {vocab_limit}")
    banned = tuple(dict.fromkeys(banned))
    for token in banned:
        if not 0 <= token < vocabulary:
            raise IndexError(f"banned ids must be in 0..{vocabulary - 1}, got {token}")
    limit = vocabulary if vocab_limit is None else vocab_limit
    if sum(token < limit for token in banned) == limit:
        raise ValueError("banned leaves no id to choose")
    return {
        "rule": rule, "temperature": float(temperature), "confidence_temperature": float(confidence_temperature),
        "confidence_dtype": confidence_dtype, "top_k": top_k, "top_p": top_p, "seed": seed, "banned": banned,
        "vocab_limit": vocab_limit,
    }  # fmt: skip


def _row_keys(row_keys: Tensor | None, rows: int, temperature: float, like: Tensor) -> Tensor | None:
    if temperature == 0:
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
