"""The eager definition of every operation: what is right, in few lines, for any float dtype.

Half-precision inputs are computed in float32, as the kernels do; float64 stays float64. Arguments
are those of the public functions of `dkv.kernels`, which check them and document their shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels.noise import gumbel


def wide(x: Tensor) -> Tensor:
    """x in the dtype of accumulation."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def visibility(q, k_buf, query_lengths, key_ranges, key_mask, mask, block_ids) -> Tensor | None:
    """Which keys a query sees: bool [B, N or 1, S], or None when every query sees every key."""
    parts = []
    if key_ranges is not None:
        slot = torch.arange(k_buf.shape[1], device=q.device)
        parts.append(((slot >= key_ranges[:, :1]) & (slot < key_ranges[:, 1:])).unsqueeze(1))
    if key_mask is not None:
        parts.append(key_mask.unsqueeze(1))
    if mask is not None:
        parts.append(mask)
    if block_ids is not None:
        query_block, key_block = block_ids
        parts.append(key_block.unsqueeze(1) <= query_block.unsqueeze(2))
    if query_lengths is not None:
        row = torch.arange(q.shape[1], device=q.device)
        parts.append((row < query_lengths[:, None]).unsqueeze(2))
    visible = None
    for part in parts:
        visible = part if visible is None else visible & part
    return visible


def cached_attention(
    q, k_buf, v_buf, *, query_lengths=None, key_ranges=None, key_mask=None, mask=None, block_ids=None, scale=None,
    return_lse=False, workspace=None,
):  # fmt: skip
    group = q.shape[2] // k_buf.shape[2]
    key, value = (wide(x).repeat_interleave(group, 2) for x in (k_buf, v_buf))
    scores = torch.einsum("bnhd,bshd->bhns", wide(q), key) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = visibility(q, k_buf, query_lengths, key_ranges, key_mask, mask, block_ids)
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    out = weighted_sum(weights, value, visible).to(q.dtype)
    return (out, lse.transpose(1, 2)) if return_lse else out


def weighted_sum(weights: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """The values [B, S, H, D] that a query sees, times their weights [B, H, N, S]: [B, N, H, D].

    A hidden value has the weight 0, but 0 times NaN is NaN: values that are not finite are added one by one, where
    they are seen.
    """
    if visible is None:
        return torch.einsum("bhns,bshd->bnhd", weights, value)
    visible, strange = visible.expand(-1, -1, value.shape[1]), ~value.isfinite()
    out = torch.einsum("bhns,bshd->bnhd", weights, value.masked_fill(strange, 0))
    for slot in strange.any((0, 2, 3)).nonzero().flatten():
        term = weights[..., slot].transpose(1, 2).unsqueeze(-1) * value[:, None, slot]
        seen = visible[:, :, slot, None, None] & strange[:, None, slot]
        out = out + torch.where(seen, term, 0)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, "rotate half" layout, in the wider of the dtypes of x and the tables.

    Args:
        x: [B, N, H, D].
        cos, sin: [N, D / 2] or [B, N, D / 2].
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def head_norm(x: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
    """RMS norm over the head size; `norm` is (gain [D], eps) or None for none."""
    if norm is None:
        return x
    gain, eps = norm
    normed = (wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed * gain).to(x.dtype)


def rope_scatter_(
    q, k, v, cos, sin, positions, k_buf, v_buf, *, query_positions=None, lengths=None, q_bias=None, k_bias=None,
    v_bias=None, q_norm=None, k_norm=None,
):  # fmt: skip
    q, k, v = (x if bias is None else x + bias for x, bias in ((q, q_bias), (k, k_bias), (v, v_bias)))
    if lengths is not None:
        used = torch.arange(positions.shape[1], device=positions.device) < lengths[:, None]
        positions = torch.where(used, positions, 0)
    query_positions = positions if query_positions is None else query_positions
    key = rotate(head_norm(k, k_norm), cos[positions], sin[positions])
    for b in range(len(positions)):
        n = positions.shape[1] if lengths is None else max(int(lengths[b]), 0)
        k_buf[b, positions[b, :n]] = key[b, :n].to(k_buf.dtype)
        v_buf[b, positions[b, :n]] = v[b, :n].to(v_buf.dtype)
    return rotate(head_norm(q, q_norm), cos[query_positions], sin[query_positions])


def gather_rows(x, index):
    out = x.new_empty((*index.shape, *x.shape[2:]))
    for b in range(len(index)):
        out[b] = x[b, index[b]]
    return out


def scatter_rows_(x, index, source):
    for b in range(len(index)):
        x[b, index[b]] = source[b].to(x.dtype)
    return x


def dropped(x: Tensor, best: Tensor, top_k: int | None, top_p: float | None) -> Tensor | None:
    """Which ids top-p and then top-k drop of the tempered logits x, bool [R, V]; `best` [R] is always kept.

    Dream's order and cuts: an id stays while the probability before it is at most `top_p`; ids that
    tie with the k-th best stay.
    """
    gone = None
    if top_p is not None and top_p < 1:
        ordered, order = x.sort(dim=-1, descending=True, stable=True)
        drop = ordered.softmax(-1).cumsum(-1).roll(1, -1) > top_p
        drop[:, 0] = False
        gone = torch.zeros_like(drop).scatter(1, order, drop)
        x = x.masked_fill(gone, -torch.inf)
    if top_k is not None and top_k < x.shape[-1]:
        low = x < x.topk(top_k).values[:, -1:]
        gone = low if gone is None else gone | low
    return gone if gone is None else gone.scatter(1, best[:, None], False)


def computable(temperature: float, dtype: torch.dtype) -> float:
    """A temperature that numbers of this dtype can be multiplied with and divided by."""
    return min(max(temperature, torch.finfo(dtype).tiny), torch.finfo(dtype).max)


def shares(temperature: float, dtype: torch.dtype) -> tuple[float, float]:
    """What a value and its noise are multiplied with before they are added: 1 / temperature and 1, or both times it.

    Neither overflows. As the temperature goes below what tells two values apart, the larger one wins, and the first
    of equal ones.
    """
    temperature = computable(temperature, dtype)
    return (1.0, temperature) if temperature < 1 else (max(1 / temperature, torch.finfo(dtype).tiny), 1.0)


def choosable(vocabulary: int, banned, vocab_limit: int | None, device: torch.device) -> Tensor:
    """bool [V]: the ids that may be chosen."""
    allowed = torch.arange(vocabulary, device=device) < (vocabulary if vocab_limit is None else vocab_limit)
    for token in banned:
        allowed[token] = False
    return allowed


def choose_token(
    logits, *, rule, temperature=0.0, confidence_temperature=1.0, top_k=None, top_p=None, seed=0, row_keys=None,
    banned=(), vocab_limit=None, confidence_dtype="exact", overwrite=False, workspace=None,
):  # fmt: skip
    allowed = choosable(logits.shape[-1], banned, vocab_limit, logits.device)
    if confidence_dtype == "model":
        return _choose_rounded(logits, allowed, rule, temperature, confidence_temperature, top_k, top_p, seed, row_keys)
    x = wide(logits)
    best = x.masked_fill(~allowed, -torch.inf).argmax(-1)
    gone = dropped(tempered(x, confidence_temperature), best, top_k, top_p)
    if gone is not None:
        x = x.masked_fill(gone, -torch.inf)
    open_ = x.masked_fill(~allowed, -torch.inf)
    token = _drawn(open_, temperature, seed, row_keys) if temperature > 0 else best
    # In float64, where a probability near 1 is told from 1; the fast backends sum the tail instead.
    log_p = tempered(x.double(), computable(confidence_temperature, x.dtype)).log_softmax(-1)
    if rule == "margin":
        top = open_.topk(min(2, open_.shape[-1])).indices
        first, second = log_p.gather(1, top[:, :1])[:, 0], log_p.gather(1, top[:, 1:])
        second = second[:, 0].masked_fill(~allowed[top[:, -1]], -torch.inf) if second.numel() else -torch.inf
        confidence = first + torch.log1p(-torch.exp(second - first))
    elif rule == "entropy":
        confidence = -torch.special.entr(log_p.exp()).sum(-1)
    else:
        confidence = log_p.gather(1, token[:, None])[:, 0]
    nothing_to_choose = open_.amax(-1) == -torch.inf
    return token, confidence.to(x.dtype).masked_fill(nothing_to_choose, torch.nan)


def tempered(x: Tensor, temperature: float) -> Tensor:
    """(x - the largest of a row) / temperature: what may overflow counts for nothing."""
    top = x.amax(-1, keepdim=True)
    return (x - top.masked_fill(top.isinf(), 0)) / computable(temperature, x.dtype)


def _drawn(x: Tensor, temperature: float, seed: int, row_keys: Tensor) -> Tensor:
    """Ids drawn from softmax(x / temperature)."""
    own, noisy = shares(temperature, x.dtype)
    return (x * own + gumbel(seed, row_keys, x.shape[-1]).to(x.dtype) * noisy).argmax(-1)


def _choose_rounded(
    logits, allowed, rule, temperature, confidence_temperature, top_k, top_p, seed, row_keys
) -> tuple[Tensor, Tensor]:
    """`choose_token` with every step rounded to the dtype of the logits, as Dream's published code has it.

    What differs from that code: the noise; ids that are not allowed; temperatures that overflow count as low; in
    float16, where 1e-10 is 0, the published entropy is NaN.
    """
    x, top = logits, logits.amax(-1, keepdim=True)
    if confidence_temperature != 1:
        heat = computable(confidence_temperature, torch.promote_types(x.dtype, torch.float32))
        x = torch.where((top / heat).isinf() & top.isfinite(), (x - top) / heat, x / heat)
    open_ = logits.masked_fill(~allowed, -torch.inf)
    best = open_.argmax(-1)
    gone = dropped(x, best, top_k, top_p)
    p = (x if gone is None else x.masked_fill(gone, -torch.inf)).softmax(-1)
    open_p = p.masked_fill(~allowed, 0)
    token = open_p.argmax(-1)
    if temperature > 0:
        token = _drawn(wide(open_p).log(), temperature / confidence_temperature, seed, row_keys)
    # Beside an id that is not allowed all others may round to 0.
    token = torch.where(open_p.amax(-1) == 0, best, token)
    if rule == "margin":
        first, second = F.pad(open_p, (0, 1)).topk(2).values.unbind(-1)
        confidence = wide(first - second).log()
    elif rule == "entropy":
        confidence = wide((p * torch.log(p + 1e-10)).masked_fill(p == 0, 0).sum(-1))
    else:
        confidence = wide(p.gather(1, token[:, None])[:, 0]).log()
    return token, confidence.masked_fill(open_.amax(-1) == -torch.inf, torch.nan)


def choose_token_fused(hidden, head_weight, *, head_bias=None, **how):
    logits = hidden @ head_weight.T if isinstance(head_weight, Tensor) else head_weight(hidden)
    return choose_token(logits if head_bias is None else logits + head_bias, **how)


def ranked(log_confidence: Tensor) -> Tensor:
    """Confidences as they are compared: half precision in float32, NaN as the lowest."""
    x = wide(log_confidence)
    return x.masked_fill(x.isnan(), -torch.inf)


def commit_(canvas, token, log_confidence, eligible, count, *, positions=None, threshold=None):
    if positions is None:
        positions = torch.arange(canvas.shape[1], device=canvas.device).expand_as(canvas)
    confidence = ranked(log_confidence)
    sure = torch.zeros_like(eligible) if threshold is None else confidence >= threshold
    committed = torch.zeros_like(eligible)
    for b in range(len(canvas)):
        open_ = [i for i in range(eligible.shape[1]) if eligible[b, i]]
        open_.sort(key=lambda i: (-float(confidence[b, i]), int(positions[b, i])))
        for rank, i in enumerate(open_):
            if rank < count[b] or sure[b, i]:
                canvas[b, positions[b, i]] = token[b, i]
                committed[b, i] = True
    return committed
