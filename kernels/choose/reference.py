"""The choice of a token, eager, for any float dtype: what is right.

Half precision is computed in float32, as the kernels do; float64 stays float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels.choose.choice import Choice
from dkv.kernels.choose.temperature import computable, shares, tempered
from dkv.kernels.common.dtypes import wide
from dkv.kernels.common.noise import gumbel
from dkv.kernels.linear.reference import int8_linear


def dropped(x: Tensor, best: Tensor, choice: Choice) -> Tensor | None:
    """Which ids top-p and then top-k drop of the tempered logits x, bool [R, V]; `best` [R] is always kept.

    Dream's order and cuts: an id stays while the probability before it is at most `top_p`; ids that
    tie with the k-th best stay.
    """
    top_k, top_p, gone = choice.top_k, choice.top_p, None
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


def choose_token(logits: Tensor, choice: Choice, row_keys: Tensor | None, **_) -> tuple[Tensor, Tensor, Tensor | None]:
    ids = torch.arange(logits.shape[-1], device=logits.device)
    allowed = ids < choice.limit(len(ids))
    for token in choice.banned:
        allowed[token] = False
    if choice.confidence_dtype == "model":
        return _choose_rounded(logits, allowed, choice, row_keys)
    x = wide(logits)
    best = x.masked_fill(~allowed, -torch.inf).argmax(-1)
    gone = dropped(tempered(x, choice.confidence_temperature), best, choice)
    if gone is not None:
        x = x.masked_fill(gone, -torch.inf)
    permitted = x.masked_fill(~allowed, -torch.inf)
    token = _drawn(permitted, choice.temperature, row_keys) if choice.temperature > 0 else best
    # In float64, where a probability near 1 is told from 1; the fast backends sum the tail instead.
    log_p = tempered(x.double(), computable(choice.confidence_temperature, x.dtype)).log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    if choice.rule == "margin":
        top = permitted.topk(min(2, permitted.shape[-1])).indices
        first, second = log_p.gather(1, top[:, :1])[:, 0], log_p.gather(1, top[:, 1:])
        second = second[:, 0].masked_fill(~allowed[top[:, -1]], -torch.inf) if second.numel() else -torch.inf
        confidence = first + torch.log1p(-torch.exp(second - first))
    elif choice.rule == "entropy":
        confidence = -entropy
    else:
        confidence = log_p.gather(1, token[:, None])[:, 0]
    nothing_to_choose = permitted.amax(-1) == -torch.inf
    found = [y.to(x.dtype).masked_fill(nothing_to_choose, torch.nan) for y in (confidence, entropy)]
    return token, found[0], found[1] if choice.entropy else None


def _drawn(x: Tensor, temperature: float, row_keys: Tensor) -> Tensor:
    """Ids drawn from softmax(x / temperature)."""
    own, noisy = shares(temperature, x.dtype)
    return (x * own + gumbel(row_keys, x.shape[-1]).to(x.dtype) * noisy).argmax(-1)


def _choose_rounded(logits: Tensor, allowed: Tensor, choice: Choice, row_keys) -> tuple[Tensor, Tensor, Tensor | None]:
    """`choose_token` with every step rounded to the dtype of the logits, as Dream's published code has it.

    What differs from that code: the noise; ids that are not allowed; temperatures that overflow count as low; in
    float16, where 1e-10 is 0, the published entropy is NaN.
    """
    x, top = logits, logits.amax(-1, keepdim=True)
    if choice.confidence_temperature != 1:
        heat = computable(choice.confidence_temperature, torch.promote_types(x.dtype, torch.float32))
        x = torch.where((top / heat).isinf() & top.isfinite(), (x - top) / heat, x / heat)
    permitted = logits.masked_fill(~allowed, -torch.inf)
    best = permitted.argmax(-1)
    gone = dropped(x, best, choice)
    p = (x if gone is None else x.masked_fill(gone, -torch.inf)).softmax(-1)
    open_p = p.masked_fill(~allowed, 0)
    token = open_p.argmax(-1)
    if choice.temperature > 0:
        token = _drawn(wide(open_p).log(), choice.temperature / choice.confidence_temperature, row_keys)
    # Beside an id that is not allowed all others may round to 0.
    token = torch.where(open_p.amax(-1) == 0, best, token)
    sum_p_log_p = wide((p * torch.log(p + 1e-10)).masked_fill(p == 0, 0).sum(-1))
    if choice.rule == "margin":
        first, second = F.pad(open_p, (0, 1)).topk(2).values.unbind(-1)
        confidence = wide(first - second).log()
    elif choice.rule == "entropy":
        confidence = sum_p_log_p
    else:
        confidence = wide(p.gather(1, token[:, None])[:, 0]).log()
    nothing_to_choose = permitted.amax(-1) == -torch.inf
    # 1 + 1e-10 is more than 1 in float64, and its logarithm positive.
    found = [y.masked_fill(nothing_to_choose, torch.nan) for y in (confidence, -sum_p_log_p.clamp(max=0))]
    return token, found[0], found[1] if choice.entropy else None


def choose_token_fused(
    hidden: Tensor,
    head_weight: Tensor,
    choice: Choice,
    head_bias: Tensor | None,
    head_scales: Tensor | None,
    row_keys: Tensor | None,
    **_,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if head_scales is not None:
        return choose_token(int8_linear(hidden, head_weight, head_scales, head_bias, None), choice, row_keys)
    logits = hidden @ head_weight.T if isinstance(head_weight, Tensor) else head_weight(hidden)
    return choose_token(logits if head_bias is None else logits + head_bias, choice, row_keys)
