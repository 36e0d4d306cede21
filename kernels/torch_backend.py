"""The operations in fast PyTorch: SDPA over the buffer, in-place writes, scratch used again.

Nothing here reads a value back to the host. Arguments are those of the public functions of
`dkv.kernels`, which check them and document their shapes; `dkv.kernels.reference` defines the results.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels import reference
from dkv.kernels.noise import gumbel
from dkv.kernels.workspace import Workspace

# Logits held at a time by `choose_token_fused`: enough rows to keep a matrix product efficient.
SCRATCH_BYTES = 64 << 20
STRIP = 1024
# Columns of the vocabulary at a time, where temporaries are needed besides the logits.
COLUMNS = 8192
BLOCK = 128
LOG2_E = 1.4426950408889634


def cached_attention(
    q, k_buf, v_buf, *, query_lengths=None, key_ranges=None, key_mask=None, mask=None, block_ids=None, scale=None,
    return_lse=False, workspace=None,
):  # fmt: skip
    if return_lse:
        return reference.cached_attention(
            q, k_buf, v_buf, query_lengths=query_lengths, key_ranges=key_ranges, key_mask=key_mask,
            mask=mask, block_ids=block_ids, scale=scale, return_lse=True,
        )  # fmt: skip
    batch, n, heads, size = q.shape
    kv_heads = k_buf.shape[2]
    group = heads // kv_heads
    query = q.transpose(1, 2)
    if group > 1:
        # The query heads of a key head become rows: K and V are never repeated.
        query = q.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(batch, kv_heads, n * group, size)
    visible = reference.visibility(q, k_buf, query_lengths, key_ranges, key_mask, mask, block_ids)
    mask = None
    if visible is not None:
        mask = visible.unsqueeze(1)
        if mask.shape[2] > 1 and group > 1:
            mask = mask.repeat_interleave(group, 2)
    out = F.scaled_dot_product_attention(
        query, k_buf.transpose(1, 2), v_buf.transpose(1, 2), attn_mask=mask, scale=scale
    )
    out = out.transpose(1, 2) if group == 1 else out.unflatten(2, (n, group)).transpose(1, 2).reshape(q.shape)
    if visible is not None:
        out = out.masked_fill(~visible.any(-1)[:, :, None, None], 0)
    return out


def _write_rows(k_buf: Tensor, v_buf: Tensor, positions: Tensor, key: Tensor, value: Tensor, valid) -> None:
    batch = torch.arange(len(positions), device=positions.device).unsqueeze(1)
    for buffer, rows in ((k_buf, key), (v_buf, value)):
        rows, slots = rows.to(buffer.dtype), positions
        if valid is not None:
            # An entry that must not write repeats the first of its row; a row without any keeps the old.
            slots = torch.where(valid, positions, positions[:, :1])
            start = torch.where(valid[:, :1, None, None], rows[:, :1], buffer[batch, positions[:, :1]])
            rows = torch.where(valid[:, :, None, None], rows, start)
        buffer.index_put_((batch, slots), rows)


def rope_scatter_(
    q, k, v, cos, sin, positions, k_buf, v_buf, *, query_positions=None, lengths=None, q_bias=None, k_bias=None,
    v_bias=None, q_norm=None, k_norm=None,
):  # fmt: skip
    q, k, v = (x if bias is None else x + bias for x, bias in ((q, q_bias), (k, k_bias), (v, v_bias)))
    q, k = reference.head_norm(q, q_norm), reference.head_norm(k, k_norm)
    valid = None
    if lengths is not None:
        valid = torch.arange(positions.shape[1], device=positions.device) < lengths[:, None]
        positions = torch.where(valid, positions, 0)  # the others may hold anything
    tables = cos[positions], sin[positions]
    key = _rotate(k, *tables)
    if query_positions is not None:
        tables = cos[query_positions], sin[query_positions]
    query = _rotate(q, *tables)
    _write_rows(k_buf, v_buf, positions, key, v, valid)
    return query


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotate` without temporaries, where the dtypes agree and no gradient is asked for."""
    if x.dtype != cos.dtype or any(t.requires_grad for t in (x, cos, sin)):
        return reference.rotate(x, cos, sin)
    cos, sin, half = cos.unsqueeze(-2), sin.unsqueeze(-2), x.shape[-1] // 2
    (a, b), out = x.split(half, -1), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = out.split(half, -1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


def gather_rows(x, index):
    return x[torch.arange(len(index), device=index.device).unsqueeze(1), index]


def scatter_rows_(x, index, source):
    batch = torch.arange(len(index), device=index.device).unsqueeze(1)
    return x.index_put_((batch, index), source.to(x.dtype))


def choose_token(logits, *, overwrite=False, workspace=None, row_keys=None, **how):
    work = Workspace() if workspace is None else workspace
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def scratch(rows: slice) -> Tensor:
        part = logits[rows]
        if overwrite and part.dtype == dtype:
            return part
        return work.take("logits", part.shape, dtype, part.device).copy_(part)

    return _by_chunks(scratch, len(logits), logits.shape[1] * dtype.itemsize, row_keys, how)


def choose_token_fused(hidden, head_weight, *, head_bias=None, workspace=None, row_keys=None, **how):
    work = Workspace() if workspace is None else workspace
    dtype = torch.promote_types(head_weight.dtype, torch.float32)

    def scratch(rows: slice) -> Tensor:
        part = hidden[rows]
        shape = (len(part), len(head_weight))
        logits = work.take("head", shape, head_weight.dtype, part.device)
        # In strips, a CPU multiplies by a wide matrix faster: it re-orders less of it at a time.
        strip = STRIP if part.device.type == "cpu" else len(head_weight)
        for start in range(0, len(head_weight), strip):
            torch.mm(part, head_weight[start : start + strip].T, out=logits[:, start : start + strip])
        if head_bias is not None:
            logits.add_(head_bias)
        return logits if logits.dtype == dtype else work.take("logits", shape, dtype, part.device).copy_(logits)

    return _by_chunks(scratch, len(hidden), len(head_weight) * dtype.itemsize, row_keys, how)


def _by_chunks(scratch: Callable[[slice], Tensor], rows: int, row_bytes: int, row_keys, how):
    """Choose for all rows, with the logits of no more than `SCRATCH_BYTES` of them held at a time."""
    step = max(1, SCRATCH_BYTES // row_bytes)
    parts = []
    for start in range(0, max(rows, 1), step):
        part = slice(start, start + step)
        parts.append(_choose_in(scratch(part), None if row_keys is None else row_keys[part], **how))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def _choose_in(
    x, row_keys, *, rule, temperature, confidence_temperature, top_k, top_p, seed, banned, vocab_limit
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens and log-confidences of the logits in `x` [R, V], which is scratch and is destroyed."""
    if confidence_temperature != 1:
        x.div_(confidence_temperature)
    if top_k is not None or (top_p is not None and top_p < 1):
        best = _forbid(x.clone(), banned, vocab_limit).argmax(-1)
        x.copy_(reference.keep_best(x, best, top_k, top_p))
    # Forbidden ids cannot win, but keep their share of the probability. A column of nothing stands for none.
    limit = x.shape[1] if vocab_limit is None else vocab_limit
    columns = [x[:, limit:]] + [x[:, i : i + 1] for i in banned if i < limit]
    closed = torch.cat([torch.full_like(x[:, :1], -torch.inf), *columns], -1)
    _forbid(x, banned, vocab_limit)
    pair = x.topk(2, sorted=True).values if rule == "margin" and x.shape[1] > 1 else None
    first, best = _best(x)
    token = _draw(x, confidence_temperature / temperature, seed, row_keys) if temperature > 0 else best
    first_closed, best_closed = closed.max(-1, keepdim=True)
    top = torch.maximum(first, first_closed)
    # Nothing to choose from, or +inf.
    top = top.masked_fill((first == -torch.inf) | (top == torch.inf), torch.nan)
    chosen = x.gather(1, token) - top
    # The sum without its largest term keeps its precision when the probability of that is almost 1.
    x.scatter_(1, best, first.masked_fill(first == top, -torch.inf)).sub_(top)
    closed.scatter_(1, best_closed, first_closed.masked_fill(first_closed > first, -torch.inf)).sub_(top)
    if rule == "entropy":
        confidence = _negative_entropy((*x.split(COLUMNS, -1), *closed.split(COLUMNS, -1)))
    else:
        # A power of two, as its exp2 is three times as fast as exp on a CPU.
        log_total = torch.log1p(x.mul_(LOG2_E).exp2_().sum(-1, True) + closed.exp_().sum(-1, True))
        confidence = (first - top if rule == "margin" else chosen) - log_total
        if pair is not None:
            confidence = confidence + torch.log1p(-torch.exp(pair[:, 1:] - pair[:, :1]))
    return token.squeeze(1), confidence.squeeze(1)


def _best(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row [R, V] and its lowest index, both [R, 1].

    `max` with an index goes through a CPU's values one by one: it gets only the winners of blocks, and then the
    block of the winner.
    """
    columns = x.shape[1]
    if columns <= 2 * BLOCK:
        return x.max(-1, keepdim=True)
    whole = columns // BLOCK * BLOCK
    winners = x[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1)
    if whole < columns:
        winners = torch.cat((winners, x[:, whole:].amax(-1, keepdim=True)), 1)
    # The last block may begin before its first column, but then that holds nothing larger.
    start = (winners.argmax(-1, keepdim=True) * BLOCK).clamp_(max=columns - BLOCK)
    first, place = x.gather(1, start + torch.arange(BLOCK, device=x.device)).max(-1, keepdim=True)
    return first, start + place


def _draw(x: Tensor, scale: float, seed: int, row_keys: Tensor) -> Tensor:
    """Ids [R, 1] drawn from softmax(x * scale): the largest of the scaled logits with Gumbel noise."""
    value, token = None, None
    for start in range(0, x.shape[1], COLUMNS):
        part = x[:, start : start + COLUMNS]
        noisy = gumbel(seed, row_keys, part.shape[1], start).to(x.dtype).add_(part, alpha=scale)
        top, place = _best(noisy)
        if start > 0:
            place = torch.where(top > value, place + start, token)
            top = torch.maximum(top, value)
        value, token = top, place
    return token


def _negative_entropy(others: Sequence[Tensor]) -> Tensor:
    """sum(p log p) from logits minus their maximum, all but the maximum; in parts, which are destroyed."""
    total = weighted = 0
    for part in others:
        part.clamp_(min=-1e4)
        weight = part.exp()
        total = total + weight.sum(-1, keepdim=True)
        weighted = weighted + weight.mul_(part).sum(-1, keepdim=True)
    log_total = torch.log1p(total)
    return weighted * torch.exp(-log_total) - log_total


def _forbid(x: Tensor, banned: tuple[int, ...], vocab_limit: int | None) -> Tensor:
    """x with the ids that must not be chosen at -inf, in place."""
    for token in banned:
        x[:, token] = -torch.inf
    if vocab_limit is not None:
        x[:, vocab_limit:] = -torch.inf
    return x


def commit_(canvas, token, log_confidence, eligible, count, *, positions=None, threshold=None):
    confidence = reference.ranked(log_confidence)
    # Clamped, so that an eligible slot of confidence -inf still comes before one that is not eligible.
    score = confidence.clamp(min=torch.finfo(confidence.dtype).min).masked_fill(~eligible, -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(order.shape[1], device=order.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    chosen = rank < count[:, None]
    if threshold is not None:
        chosen = chosen | (confidence >= threshold)
    committed = chosen & eligible
    if positions is None:
        canvas.copy_(torch.where(committed, token, canvas))
    else:
        # Added, as an entry that is not committed may name the slot of one that is.
        canvas.scatter_add_(1, positions, (token - canvas.gather(1, positions)).masked_fill_(~committed, 0))
    return committed
