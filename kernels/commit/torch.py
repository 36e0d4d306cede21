"""The commit of a step in fast PyTorch, without reading a value back to the host."""

import torch
from torch import Tensor

from dkv.kernels.commit.together import beside, bounded, finite
from dkv.kernels.plan.torch import columns


def commit_(canvas, token, log_confidence, eligible, count, positions):
    score = finite(log_confidence).masked_fill_(~eligible, -torch.inf)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    committed = (rank < count.unsqueeze(1)).logical_and_(eligible)
    if positions is None:
        torch.where(committed, token, canvas, out=canvas)
    else:
        # Added, as an entry that is not committed may name the slot of one that is.
        present = canvas.gather(1, positions)
        canvas.scatter_add_(1, positions, torch.where(committed, token, present).sub_(present))
    return committed


def advance_(state, table, passed, choice, rules):
    unfinished = state.masked.any(1, keepdim=True)
    # Those that are active and not masked.
    state.seen.logical_or_(passed.active > state.masked)
    if choice.token.numel() and state.masked.numel():
        _fill(state, passed, choice, rules)
    else:
        state.fresh.zero_()
    index, start, stop, next_block = columns(state.now, "index", "start", "stop", "next_block")
    open_left = (state.masked & (state.rank >= start) & (state.rank < stop)).any(1, keepdim=True)
    following = torch.where(open_left, index + 1, next_block).clamp_(max=table.shape[1] - 1)
    at = torch.where(unfinished, following, state.at.unsqueeze(1))
    state.at.copy_(at.squeeze(1))
    state.now.copy_(table.gather(1, at.unsqueeze(2).expand(-1, 1, table.shape[2])).squeeze(1))
    if rules.ends is not None:
        _end(state, unfinished, rules)


def _fill(state, passed, choice, rules) -> None:
    """Write the tokens of the slots that are filled, and note which they are."""
    batch, size = passed.scored.shape
    slots = passed.scored.reshape(-1).nonzero_static(size=len(choice.token), fill_value=batch * size).view(-1)
    real, rows, places = slots < batch * size, None, slots
    if batch > 1:
        # What fills up has the spare slot of the last row.
        rows = (slots // size).clamp_(max=batch - 1)
        places = slots + rows
    allowed = real
    if passed.eligible is not None:
        allowed = passed.eligible.take(slots.clamp(max=batch * size - 1)) & real
    nan = choice.confidence.isnan() & real
    found = nan.any() if rows is None else torch.zeros_like(passed.count).index_add_(0, rows, nan.long()) > 0
    state.invalid.logical_or_(found)
    count, also = passed.count, None
    if rules.rule in ("threshold", "factor"):
        count = _confident(choice, allowed, rows, passed, rules)
    elif rules.rule != "fixed":
        count, also = _together(choice, passed, rules)
    committed = _order(choice.score, allowed, rows) < _by_row(passed.starts + count, rows)
    if also is not None:
        committed = committed | also.take(slots.clamp(max=batch * size - 1))
    committed = committed & allowed
    state.fresh.zero_().masked_scatter_(passed.scored, committed)
    state.masked.masked_fill_(state.fresh, False)
    state.tokens.put_(places, torch.where(committed, choice.token, state.tokens.take(places)))


def _by_row(x: Tensor, rows: Tensor | None) -> Tensor:
    """Values [B] of the rows of entries, [R] or [1]; `rows` is None of a single row."""
    return x if rows is None else x.index_select(0, rows)


def _order(score: Tensor, allowed: Tensor, rows: Tensor | None) -> Tensor:
    """Where each entry [R] stands if those of every row are put in order: allowed ones first, by falling score."""
    order = finite(score).masked_fill_(~allowed, -torch.inf).sort(descending=True, stable=True).indices
    if rows is not None:
        order = order.index_select(0, rows.index_select(0, order).sort(stable=True).indices)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _confident(choice, allowed: Tensor, rows: Tensor | None, passed, rules) -> Tensor:
    """How many slots of every row fulfil the rule of confidence, at least the count of the pass: [B]."""
    if rules.finite_only:
        allowed = allowed & (choice.confidence > -torch.inf)
    known = finite(choice.confidence.float())
    if rules.rule == "threshold":
        bound = rules.bound if passed.bound is None else _by_row(passed.bound, rows)
        sure = (known >= bound) & allowed
    else:
        number = _order(known, allowed, rows) - _by_row(passed.starts, rows) + 2
        sure = (number * -torch.expm1(known) < rules.bound) & allowed
    if rows is None:
        found = sure.sum(0, keepdim=True)
    else:
        found = torch.zeros_like(passed.count).scatter_add_(0, rows, sure.long())
    return torch.maximum(found, passed.count)


def _together(choice, passed, rules) -> tuple[Tensor, Tensor | None]:
    """How many slots of every row are filled [B], and which beside these [B, S], by what holds of a row as a whole."""

    def by_slot(x: Tensor) -> Tensor:
        return x.new_zeros(passed.scored.shape).masked_scatter_(passed.scored, x)

    may, confidence = passed.scored, by_slot(choice.confidence)
    if passed.eligible is not None:
        may = may & passed.eligible
    if rules.finite_only:
        may = may & (confidence > -torch.inf)
    if rules.rule == "near":
        bound = rules.bound if passed.bound is None else passed.bound.unsqueeze(1)
        return passed.count, beside(confidence, may, bound, rules)
    found = bounded(by_slot(choice.score), by_slot(choice.entropy), may, rules)
    return torch.maximum(found, passed.count), None


def _end(state, unfinished: Tensor, rules) -> None:
    """Cut every unfinished row after its first end that has no masked slot before it."""
    tokens, to_fill = state.tokens[:, :-1], state.rank >= 0
    known = state.masked.cumsum(1) == 0
    # `torch.isin` waits for a GPU where the ends are many.
    end = (tokens[..., None] == rules.ends).any(-1) & known & to_fill & unfinished
    beyond = (end.cumsum(1) > end) & to_fill
    tokens.masked_fill_(beyond, rules.pad)
    state.masked.masked_fill_(beyond, False)
    state.seen.masked_fill_(beyond, False)
    state.cut.add_(beyond.sum(1))
