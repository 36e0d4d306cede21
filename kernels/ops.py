"""The operations as torch custom ops, and the choice between running one and recording it.

Plain tensors go straight to a backend. Under `torch.compile`, `torch.export` and fake tensors an
operation is recorded as one opaque node; what that runs is decided when it runs. A recorded operation
gives dense results, as a compiler must know their strides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._pytree import tree_leaves

from dkv.kernels import backend, torch_backend


def run(name: str, like: Tensor, *args: Any, differentiable: bool = True, **kwargs: Any) -> Any:
    """Run operation `name` with `like` as its first argument, whose device and dtype choose the backend.

    The kernels have no backward pass: where a gradient is asked for, PyTorch computes.

    Raises:
        ValueError: a gradient is asked for from an operation that has none.
    """
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((like, args, kwargs))
    ):
        if not differentiable:
            raise ValueError(f"{name} has no gradient: call it under torch.no_grad(), or detach its arguments")
        return getattr(torch_backend, name)(like, *args, **kwargs)
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return RECORDED[name](like, *args, **kwargs)
    return getattr(backend.current(like), name)(like, *args, **kwargs)


@library.custom_op("dkv::cached_attention", mutates_args=())
def _cached_attention(
    q: Tensor, k_buf: Tensor, v_buf: Tensor, query_lengths: Tensor | None, key_ranges: Tensor | None,
    key_mask: Tensor | None, mask: Tensor | None, query_blocks: Tensor | None, key_blocks: Tensor | None,
    scale: float | None, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = backend.current(q).cached_attention(
        q, k_buf, v_buf, query_lengths=query_lengths, key_ranges=key_ranges, key_mask=key_mask, mask=mask,
        block_ids=None if query_blocks is None else (query_blocks, key_blocks), scale=scale, return_lse=return_lse,
    )  # fmt: skip
    out, lse = found if return_lse else (found, q.new_empty(0))
    return out.contiguous(), lse.contiguous()


@_cached_attention.register_fake
def _(q, k_buf, v_buf, query_lengths, key_ranges, key_mask, mask, query_blocks, key_blocks, scale, return_lse):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide) if return_lse else q.new_empty(0)


def cached_attention(q, k_buf, v_buf, *, block_ids, return_lse, workspace, **rules):
    query_blocks, key_blocks = block_ids or (None, None)
    out, lse = _cached_attention(
        q, k_buf, v_buf, query_blocks=query_blocks, key_blocks=key_blocks, return_lse=return_lse, **rules
    )
    return (out, lse) if return_lse else out


@library.custom_op("dkv::rope_scatter_", mutates_args=("k_buf", "v_buf"))
def _rope_scatter_(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_buf: Tensor, v_buf: Tensor,
    query_positions: Tensor | None, lengths: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    v_bias: Tensor | None, q_gain: Tensor | None, q_eps: float, k_gain: Tensor | None, k_eps: float,
) -> Tensor:  # fmt: skip
    rotated = backend.current(q).rope_scatter_(
        q, k, v, cos, sin, positions, k_buf, v_buf, query_positions=query_positions, lengths=lengths, q_bias=q_bias,
        k_bias=k_bias, v_bias=v_bias, q_norm=None if q_gain is None else (q_gain, q_eps),
        k_norm=None if k_gain is None else (k_gain, k_eps),
    )  # fmt: skip
    return rotated.contiguous()


@_rope_scatter_.register_fake
def _(q, *_):
    return q.new_empty(q.shape)


def rope_scatter_(*tensors, q_norm, k_norm, **options):
    (q_gain, q_eps), (k_gain, k_eps) = q_norm or (None, 0.0), k_norm or (None, 0.0)
    return _rope_scatter_(*tensors, q_gain=q_gain, q_eps=q_eps, k_gain=k_gain, k_eps=k_eps, **options)


@library.custom_op("dkv::gather_rows", mutates_args=())
def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return backend.current(x).gather_rows(x, index).contiguous()


@gather_rows.register_fake
def _(x, index):
    return x.new_empty((*index.shape, *x.shape[2:]))


@library.custom_op("dkv::scatter_rows_", mutates_args=("x",))
def _scatter_rows_(x: Tensor, index: Tensor, source: Tensor) -> None:
    backend.current(x).scatter_rows_(x, index, source)


@_scatter_rows_.register_fake
def _(x, index, source):
    return None


def scatter_rows_(x, index, source):
    _scatter_rows_(x, index, source)
    return x


@library.custom_op("dkv::choose_token", mutates_args=())
def _choose_token(
    logits: Tensor, rule: str, temperature: float, confidence_temperature: float, top_k: int | None,
    top_p: float | None, seed: int, row_keys: Tensor | None, banned: Sequence[int], vocab_limit: int | None,
    confidence_dtype: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return backend.current(logits).choose_token(
        logits, rule=rule, temperature=temperature, confidence_temperature=confidence_temperature, top_k=top_k,
        top_p=top_p, seed=seed, row_keys=row_keys, banned=tuple(banned), vocab_limit=vocab_limit,
        confidence_dtype=confidence_dtype,
    )  # fmt: skip


@_choose_token.register_fake
def _(logits, *_, **__):
    return _choice_like(logits)


def choose_token(logits, *, overwrite, workspace, **how):
    return _choose_token(logits, **how)


@library.custom_op("dkv::choose_token_fused", mutates_args=())
def _choose_token_fused(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, rule: str, temperature: float,
    confidence_temperature: float, top_k: int | None, top_p: float | None, seed: int, row_keys: Tensor | None,
    banned: Sequence[int], vocab_limit: int | None, confidence_dtype: str = "exact",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return backend.current(hidden).choose_token_fused(
        hidden, head_weight, head_bias=head_bias, rule=rule, temperature=temperature,
        confidence_temperature=confidence_temperature, top_k=top_k, top_p=top_p, seed=seed, row_keys=row_keys,
        banned=tuple(banned), vocab_limit=vocab_limit, confidence_dtype=confidence_dtype,
    )  # fmt: skip


@_choose_token_fused.register_fake
def _(hidden, *_, **__):
    return _choice_like(hidden)


def choose_token_fused(hidden, head_weight, *, workspace, **how):
    if not isinstance(head_weight, Tensor):
        del how["head_bias"]
        return _choose_token(head_weight(hidden), **how)
    return _choose_token_fused(hidden, head_weight, **how)


def _choice_like(x):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=wide)


@library.custom_op("dkv::commit_", mutates_args=("canvas",))
def commit_(
    canvas: Tensor, token: Tensor, log_confidence: Tensor, eligible: Tensor, count: Tensor,
    positions: Tensor | None, threshold: float | None,
) -> Tensor:  # fmt: skip
    return backend.current(canvas).commit_(
        canvas, token, log_confidence, eligible, count, positions=positions, threshold=threshold
    )


@commit_.register_fake
def _(canvas, token, log_confidence, eligible, count, positions, threshold):
    return eligible.new_empty(eligible.shape)


RECORDED = {
    f.__name__: f for f in (cached_attention, rope_scatter_, scatter_rows_, choose_token, choose_token_fused)
} | {"gather_rows": gather_rows, "commit_": commit_}
