"""The commit of a step, eager, one entry after the other: what is right."""

from typing import NamedTuple

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide
from dkv.kernels.plan.reference import FIELDS

# Of how many slots are filled, see `Rules`.
RULES = ("fixed", "threshold", "factor")


class State(NamedTuple):
    """What a step changes of the rows, in place; but for `rank`, which stays.

    Attributes:
        tokens: int64 [B, S + 1]; the last slot of a row is a spare one.
        masked: bool [B, S], slots without a token.
        fresh: bool [B, S], slots that the step has filled.
        seen: bool [B, S], slots that were computed when their token was known.
        rank: int64 [B, S], slots to fill counted from the left of their row, from 0; -1 elsewhere.
        at: int64 [B], the step that a row is about to take.
        now: int64 [B, 7], that step, a line of the row's table.
        cut: int64 [B], slots that became padding beyond an end.
        invalid: bool [], whether any confidence was NaN.
    """

    tokens: Tensor
    masked: Tensor
    fresh: Tensor
    seen: Tensor
    rank: Tensor
    at: Tensor
    now: Tensor
    cut: Tensor
    invalid: Tensor


class Pass(NamedTuple):
    """What was computed, as `plan_pass` and `pack_pass` say it: bool [B, S], and int64 [B].

    Attributes:
        active, scored: slots; none of a row without a masked slot.
        eligible: slots that may be filled; None: the scored ones.
        count: how many are filled; with a rule of confidence, at least.
        starts: the place of a row's first scored slot among those of all rows.
    """

    active: Tensor
    scored: Tensor
    eligible: Tensor | None
    count: Tensor
    starts: Tensor


class Chosen(NamedTuple):
    """By scored slot its token (int64), its confidence and what it is ranked by (float), all [R].

    Slots are in ascending order, row after row. With R = 0 nothing is filled.
    """

    token: Tensor
    confidence: Tensor
    score: Tensor


class Rules(NamedTuple):
    """How many slots are filled at once, and where a row ends.

    Attributes:
        ends: int64 [E], tokens that end a row; None: none does.
        pad: the token beyond an end.
        rule: "fixed": `count` slots are filled. "threshold": all that are at least as confident as `bound`.
            "factor": the n most confident ones, for the largest n with (n + 1) (1 - exp(c)) < `bound`, c being the
            n-th highest confidence (Fast-dLLM, Wu et al. 2025).
        bound: of the rule.
        finite_only: slots of confidence -inf never fulfil it.
    """

    ends: Tensor | None = None
    pad: int = 0
    rule: str = "fixed"
    bound: float = 0.0
    finite_only: bool = False


def ranked(log_confidence: Tensor) -> Tensor:
    """Confidences as they are compared: half precision in float32, NaN as the lowest."""
    x = wide(log_confidence)
    return x.masked_fill(x.isnan(), -torch.inf)


def commit_(canvas, token, log_confidence, eligible, count, positions: Tensor | None) -> Tensor:
    if positions is None:
        positions = torch.arange(canvas.shape[1], device=canvas.device).expand_as(canvas)
    confidence = ranked(log_confidence)
    committed = torch.zeros_like(eligible)
    for b in range(len(canvas)):
        entries = [i for i in range(eligible.shape[1]) if eligible[b, i]]
        entries.sort(key=lambda i: (-float(confidence[b, i]), int(positions[b, i])))
        for i in entries[: max(int(count[b]), 0)]:
            canvas[b, positions[b, i]] = token[b, i]
            committed[b, i] = True
    return committed


def confident(confidence: Tensor, rules: Rules) -> int:
    """How many of these slots of a row, confidences [n], fulfil a rule of confidence."""
    if rules.finite_only:
        confidence = confidence[confidence > -torch.inf]
    best = ranked(confidence.float()).clamp(min=torch.finfo(torch.float32).min).sort(descending=True).values
    if rules.rule == "threshold":
        return int((best >= rules.bound).sum())
    number = torch.arange(2, len(best) + 2, device=best.device)
    return int((number * -torch.expm1(best) < rules.bound).sum())


def advance_(state: State, table, passed: Pass, choice: Chosen, rules: Rules) -> None:
    for b in range(len(state.masked)):
        tokens, masked, fresh, seen, rank = (x[b] for x in state[:5])
        fresh.fill_(False)
        if not masked.any():
            continue
        seen |= passed.active[b] & ~masked
        slots = passed.scored[b].nonzero()[:, 0] if len(choice.token) else []
        first = int(passed.starts[b])
        token, confidence, score = (x[first : first + len(slots)] for x in choice)
        state.invalid.logical_or_(confidence.isnan().any())
        allowed = [i for i, slot in enumerate(slots) if passed.eligible is None or passed.eligible[b, slot]]
        count = int(passed.count[b])
        if rules.rule != "fixed":
            count = max(count, confident(confidence[allowed], rules))
        score = ranked(score)
        allowed.sort(key=lambda i: -float(score[i]))
        for i in allowed[: max(count, 0)]:
            tokens[slots[i]], masked[slots[i]], fresh[slots[i]] = token[i], False, True
        step = dict(zip(FIELDS, state.now[b].tolist(), strict=True))
        open_left = bool((masked & (rank >= step["start"]) & (rank < step["stop"])).any())
        state.at[b] = min(step["index"] + 1 if open_left else step["next_block"], table.shape[1] - 1)
        state.now[b] = table[b, state.at[b]]
        if rules.ends is not None:
            _end(tokens, masked, seen, rank, state.cut[b], rules)


def _end(tokens, masked, seen, rank, cut, rules: Rules) -> None:
    """Cut a row [S] after its first end that has no masked slot before it."""
    first = int(masked.int().argmax()) if masked.any() else len(masked)
    found = [slot for slot in range(first) if rank[slot] >= 0 and tokens[slot] in rules.ends]
    if found:
        beyond = [slot for slot in range(found[0] + 1, len(masked)) if rank[slot] >= 0]
        tokens[beyond], masked[beyond], seen[beyond] = rules.pad, False, False
        cut += len(beyond)
