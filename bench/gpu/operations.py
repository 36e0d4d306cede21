"""The table of operations: their inputs, ways, bytes, FLOPs and tolerances, for checks and timing alike."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.bench.baselines import operations as eager
from dkv.bench.gpu import change, linear, state
from dkv.bench.gpu.cases import Case, Inputs, Sizes, counts, distinct, heads, nbytes, randn, tolerance
from dkv.bench.gpu.mass import mass
from dkv.bench.gpu.ways import both_sides, compiled_flex, sdpa, seen
from dkv.models.int8 import quantised

MOST_LOGIT_ROWS = 4096


def _sizes(z: Sizes) -> dict[str, int]:
    numbers = {"Hq": z.spec.num_heads, "Hkv": z.spec.num_kv_heads, "D": z.spec.head_dim}
    return {"B": z.batch, "N": z.active, "S": z.slots, **numbers}


def attention(
    z: Sizes, device: torch.device, ragged: bool = False, gap: bool = False, lse: bool = False, **rules: Any
) -> Case:
    """Attention of the active queries over the whole buffer.

    Fresh keys and values are in their slots already: bringing them there is part of rope_scatter.

    Args:
        ragged: rows end between half of the slots and all of them.
        gap: the second half of a row is hidden but for its last slot, as the masks far behind a block may be.
        lse: also the log-sum-exp.
        rules: further arguments that say who sees what; they have no other ways, and no figures.
    """
    inputs: Inputs = dict(zip("qkv", heads(z, device, z.active, z.slots, z.slots), strict=True)) | rules
    stops = [z.slots] * z.batch
    if ragged:
        stops = counts(z, device, z.slots)[0].tolist()
        inputs["key_ranges"] = torch.tensor([[0, stop] for stop in stops], device=device)
    if gap:
        inputs["key_gaps"] = torch.tensor([[stop // 2, stop - 1] for stop in stops], device=device)
    work, compiled = kernels.Workspace(), cache(lambda: compiled_flex(inputs))

    def run(inputs: Inputs) -> Any:
        given = {name: value for name, value in inputs.items() if name not in ("q", "k", "v")}
        return kernels.cached_attention(inputs["q"], inputs["k"], inputs["v"], return_lse=lse, workspace=work, **given)

    others = {"eager": lambda x: eager.attention(x["q"], x["k"], x["v"], seen(x)), "sdpa": sdpa}
    others["flex"] = lambda _: compiled()()
    keys = z.batch * z.slots if rules else int(seen(inputs).sum())
    pairs = keys * z.spec.num_heads * z.spec.head_dim
    read = 2 * keys * z.spec.num_kv_heads * z.spec.head_dim * z.dtype.itemsize
    return Case(
        "cached_attention",
        _sizes(z),
        inputs,
        run,
        tolerance(z.dtype, 2),
        read + 2 * nbytes(inputs["q"]),
        4 * pairs * z.active,
        {} if rules or lse else others,
        # Scores, up to about 5, are rounded twice, which their exponentials multiply.
        eager_tolerance=tolerance(z.dtype, 6),
    )


def rope_scatter(z: Sizes, device: torch.device, norm: bool = False) -> Case:
    """Rotation of queries and keys, and the keys and values of the active slots among all others.

    dkv writes the active slots into a buffer of rotated keys. The published code keeps keys unrotated: it joins
    the fresh and the kept ones in every layer, brings them in order, and rotates all. In a full step there is nothing
    to join: eager rotates, and writes by index.
    """
    table = torch.float32 if z.spec.rope_float32 else z.dtype
    angle = torch.rand(z.slots, z.spec.head_dim // 2, device=device) * 6
    cos, sin = angle.cos().to(table), angle.sin().to(table)
    q, k, v = heads(z, device, z.active, z.active, z.active)
    positions = distinct(device, z.batch, z.active, z.slots)
    idle = torch.ones(z.batch, z.slots, dtype=torch.bool, device=device).scatter_(1, positions, False)
    kept = idle.nonzero()[:, 1].view(z.batch, -1)
    kept_k, kept_v = (randn(device, *kept.shape, *k.shape[2:], dtype=z.dtype) for _ in range(2))
    k_buf, v_buf = (torch.zeros(z.batch, z.slots, *k.shape[2:], device=device, dtype=z.dtype) for _ in range(2))
    row = torch.arange(z.batch, device=device).unsqueeze(1)
    k_buf[row, kept], v_buf[row, kept] = eager.rotate(kept_k, cos[kept], sin[kept]), kept_v
    order = torch.cat((positions, kept), 1).argsort(1)
    names = ("q", "k", "v", "cos", "sin", "positions", "k_buf", "v_buf")
    inputs: Inputs = dict(zip(names, (q, k, v, cos, sin, positions, k_buf, v_buf), strict=True))
    if norm:
        gain = randn(device, 2, z.spec.head_dim, dtype=z.dtype)
        inputs |= {"q_norm": (gain[0], 1e-6), "k_norm": (gain[1], 1e-5)}

    def joined(x: Inputs) -> Any:
        return eager.rope_cat(*(x[name] for name in names[:6]), kept_k, kept_v, order)

    def indexed(x: Inputs) -> Tensor:
        return eager.rope_scatter_(*(x[name] for name in names))

    rows = 2 * len(positions.unique()) * cos[0].nbytes
    return Case(
        "rope_scatter_",
        _sizes(z),
        inputs,
        lambda x: kernels.rope_scatter_(**x, validate=False),
        tolerance(z.dtype, 5 if norm else 3),
        2 * nbytes(q, k, v) + rows + nbytes(positions),
        3 * (q.numel() + k.numel()),
        {} if norm else {"eager": joined if kept.numel() else indexed},
        written=("k_buf", "v_buf"),
    )


def _softmax_dtype(z: Sizes) -> torch.dtype:
    """The published sampler of LLaDA takes float64, that of Dream the dtype of the logits."""
    return torch.float64 if z.spec.family == "llada" else z.dtype


def _best(logits: Callable[[Inputs, Tensor], Tensor], rule: str) -> Callable[[Inputs, Any], tuple[Tensor, ...]]:
    """Tokens are judged by their logits, as rounded ones may tie; a margin, which may be 0, by itself."""

    def judged(inputs: Inputs, found: Any) -> tuple[Tensor, ...]:
        token, confidence, *entropy = (x for x in found if x is not None)
        return logits(inputs, token), confidence.exp() if rule == "margin" else confidence, *entropy

    return judged


def choose(
    z: Sizes,
    device: torch.device,
    drawn: bool = False,
    rule: str = "probability",
    row_keys: Tensor | None = None,
    entropy: bool = False,
    **how: Any,
) -> Case:
    """The most probable token of every row of logits, and how probable it is; `drawn` at temperature 1.

    Args:
        entropy: also that of the distribution.
    """
    logits = randn(device, min(z.batch * z.active, MOST_LOGIT_ROWS), z.spec.vocab_size, dtype=z.dtype)
    # The published samplers do not forbid the mask: here it never wins.
    logits[:, z.spec.mask_token_id] = 0
    known = {"rule": rule, "temperature": float(drawn), "entropy": entropy, "validate": False}
    how = known | {"banned": (z.spec.mask_token_id,)} | how
    work = kernels.Workspace()
    eager_ = {"eager": lambda x: eager.choose_token(x["logits"], _softmax_dtype(z), entropy)}
    return Case(
        "choose_token",
        {"R": len(logits), "V": logits.shape[1]},
        {"logits": logits} | ({} if row_keys is None else {"row_keys": row_keys}),
        lambda x: kernels.choose_token(**x, workspace=work, **how),
        tolerance(torch.float32, 0, sums=64),
        nbytes(logits) + _chosen_bytes(len(logits), entropy),
        4 * logits.numel(),
        {} if drawn or rule != "probability" else eager_,
        # Dream's softmax rounds to the dtype of the logits.
        eager_tolerance=tolerance(z.dtype, 2) if z.spec.family == "dream" else None,
        judged=_best(lambda x, token: x["logits"].gather(1, token.unsqueeze(1)), rule),
    )


def _chosen_bytes(rows: int, entropy: bool) -> int:
    """Of the tokens, int64, and their confidences and entropies, float32."""
    return (16 if entropy else 12) * rows


def choose_fused(
    z: Sizes,
    device: torch.device,
    rule: str = "probability",
    bias: bool = False,
    entropy: bool = False,
    eight: bool = False,
) -> Case:
    """The product with the LM head, in 8 bits if `eight`, and the choice from it, as one operation."""
    rows, d, v = min(z.batch * z.active, MOST_LOGIT_ROWS), z.spec.hidden_size, z.spec.vocab_size
    inputs: Inputs = {
        "hidden": randn(device, rows, d, dtype=z.dtype),
        "head_weight": randn(device, v, d, dtype=z.dtype),
    }
    inputs["head_weight"] *= 2 * d**-0.5
    inputs["head_weight"][z.spec.mask_token_id] = 0
    if eight:
        inputs |= zip(("head_weight", "head_scales"), quantised(inputs["head_weight"]), strict=True)
    if bias:
        inputs["head_bias"] = randn(device, v, dtype=z.dtype)
    how = {"rule": rule, "banned": (z.spec.mask_token_id,), "entropy": entropy}
    work = kernels.Workspace()
    eager_ = {"eager": lambda x: eager.choose_token(x["hidden"] @ x["head_weight"].T, _softmax_dtype(z), entropy)}

    def logits(x: Inputs, token: Tensor) -> Tensor:
        shift = x["head_bias"].double()[token] if bias else 0
        scale = x["head_scales"].double()[token] if eight else 1
        return (x["hidden"].double() * x["head_weight"][token].double()).sum(1) * scale + shift

    return Case(
        "choose_token_fused",
        {"R": rows, "d": d, "V": v},
        inputs,
        lambda x: kernels.choose_token_fused(**x, workspace=work, validate=False, **how),
        # Rounded to half precision, logits of up to 10 make confidences and margins of about 1.
        tolerance(z.dtype, 8 if z.dtype.itemsize == 2 else 0, sums=64),
        nbytes(*inputs.values()) + _chosen_bytes(rows, entropy),
        2 * rows * d * v,
        {}
        if eight
        else ({} if bias or rule != "probability" else eager_) | both_sides(device, kernels.Choice(**how), work),
        judged=_best(logits, rule),
    )


def commit(z: Sizes, device: torch.device, count: Tensor | None = None, steps: int = 0) -> Case:
    """The most confident tokens of every row go into the canvas: one, or `count`; `steps` > 0: confidences that tie."""
    confidence = randn(device, z.batch, z.active)
    inputs: Inputs = {
        "canvas": torch.zeros(z.batch, z.slots, dtype=torch.int64, device=device),
        "token": torch.randint(1, z.spec.vocab_size, (z.batch, z.active)).to(device),
        "log_confidence": (confidence * steps).round() / steps if steps else confidence,
        "eligible": (torch.rand(z.batch, z.active) < 0.9).to(device),
        "count": torch.ones(z.batch, dtype=torch.int64, device=device) if count is None else count,
        "positions": distinct(device, z.batch, z.active, z.slots),
    }
    row = torch.arange(z.batch, device=device)[:, None]

    def published(x: Inputs) -> Tensor:
        part = x["canvas"][row, x["positions"]]
        committed = eager.commit_(part, x["token"], x["log_confidence"], x["eligible"], x["count"])
        x["canvas"][row, x["positions"]] = part
        return committed

    # Read: what describes the slots. Written: which of them are committed, and one token in every row.
    read = [x for name, x in inputs.items() if name != "canvas"]
    return Case(
        "commit_",
        {"B": z.batch, "N": z.active, "S": z.slots},
        inputs,
        lambda x: kernels.commit_(**x, validate=False),
        bytes=nbytes(*read, inputs["eligible"]) + z.batch * inputs["token"].element_size(),
        others={} if count is not None else {"eager": published},
        written=("canvas",),
    )


def norm(z: Sizes, device: torch.device) -> Case:
    """The residual is added, kept and normed."""
    size = (z.batch, z.active, z.spec.hidden_size)
    x, residual = (randn(device, *size, dtype=z.dtype) for _ in range(2))
    inputs: Inputs = {"x": x, "gain": randn(device, size[-1], dtype=z.dtype), "residual": residual}

    return Case(
        "rms_norm",
        {"B": z.batch, "N": z.active, "d": size[-1]},
        inputs,
        lambda x: kernels.rms_norm(x["x"], x["gain"], residual=x["residual"]),
        # The sum is rounded to the dtype before it is normed, which float64 does not do.
        tolerance(z.dtype, 4),
        nbytes(*inputs.values()) + 2 * nbytes(x),
        others={"eager": lambda x: eager.rms_norm(**x)},
    )


def gate(z: Sizes, device: torch.device) -> Case:
    """The gated activation on the joined product of gate and up."""
    inputs: Inputs = {"gate_up": randn(device, z.batch, z.active, 2 * z.spec.intermediate_size, dtype=z.dtype)}
    return Case(
        "swiglu",
        {"B": z.batch, "N": z.active, "d": z.spec.intermediate_size},
        inputs,
        lambda x: kernels.swiglu(x["gate_up"]),
        tolerance(z.dtype, 2),
        nbytes(*inputs.values()) * 3 // 2,
        others={"eager": lambda x: eager.swiglu(*x["gate_up"].chunk(2, -1))},
    )


OPERATIONS: dict[str, Callable[..., Case]] = {
    "cached_attention": attention,
    "attention_mass": mass,
    "rope_scatter_": rope_scatter,
    "choose_token": choose,
    "choose_token_fused": choose_fused,
    "commit_": commit,
    "rms_norm": norm,
    "swiglu": gate,
    "int8_linear": linear.linear8,
    "int4_linear": linear.linear4,
    "row_change": change.change,
    "keep_rows_": change.keep,
    "plan_pass": state.plan,
    "pack_pass": state.pack,
    "with_masked_window": state.window,
    "advance_": state.advance,
}
