"""The commit of a step, eager, one entry after the other: what is right."""

from typing import NamedTuple

import torch
from torch import Tensor

from dkv.kernels.common.dtypes import wide
from dkv.kernels.plan.reference import FIELDS

# Of how many slots are filled, see `Rules`.
RULES = ("fixed", "threshold", "factor", "entropy_sum", "entropy", "near")
ENTROPY_RULES = ("entropy_sum", "entropy")
# Entropies are added up as whole multiples of 2^-36 nats, of which none is larger than 32: whole numbers have one sum,
# in whatever order, so no backend and no neighbour in the batch can decide what just fulfils a bound.
UNIT, LARGEST = 2.0**-36, 32.0


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
        invalid: bool [B], whether any confidence of the row was NaN.
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
        bound: float [B], what "threshold" and "near" go by in each row, in place of the bound of `Rules`; None: that.
    """

    active: Tensor
    scored: Tensor
    eligible: Tensor | None
    count: Tensor
    starts: Tensor
    bound: Tensor | None = None


class Chosen(NamedTuple):
    """By scored slot its token (int64), its confidence and what it is ranked by (float), all [R].

    Slots are in ascending order, row after row. With R = 0 nothing is filled.

    Attributes:
        entropy: float, of the distribution that the confidence is of, in nats; None: the rule does not ask for it.
    """

    token: Tensor
    confidence: Tensor
    score: Tensor
    entropy: Tensor | None = None


class Rules(NamedTuple):
    """How many slots are filled at once, and where a row ends.

    Attributes:
        ends: int64 [E], tokens that end a row; None: none does.
        pad: the token beyond an end.
        rule: "fixed": `count` slots are filled. "threshold": all that are at least as confident as `bound`.
            "factor": the n most confident ones, for the largest n with (n + 1) (1 - exp(c)) < `bound`, c being the
            n-th highest confidence (Fast-dLLM, Wu et al. 2025). "entropy": the n of highest score, for the largest n
            whose entropies without the largest of them add up to at most `bound` (Ben-Hamu et al. 2025).
            "entropy_sum": the same without the last of them, as in the published code of d2Cache: the stricter one, as
            the last is at most the largest. "near": all that are at least as confident as `bound`, and those at most
            `radius` slots from one of these that are at least as confident as `near` (LocalLeap).
        bound, near, radius: of the rule.
        finite_only: slots of confidence -inf never fulfil it.
    """

    ends: Tensor | None = None
    pad: int = 0
    rule: str = "fixed"
    bound: float = 0.0
    finite_only: bool = False
    near: float = 0.0
    radius: int = 0


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


def units(entropy: Tensor) -> Tensor:
    """Entropies in `UNIT`s, rounded up, so that only 0 counts as nothing; int64. NaN is as large as any."""
    return (entropy.float().nan_to_num(LARGEST).clamp(0, LARGEST) / UNIT).ceil().long()


def confident(confidence: Tensor, rules: Rules) -> int:
    """How many of these slots of a row, confidences [n], fulfil "threshold" or "factor"."""
    best = confidence.sort(descending=True).values
    if rules.rule == "threshold":
        return int((best >= rules.bound).sum())
    number = torch.arange(2, len(best) + 2, device=best.device)
    return int((number * -torch.expm1(best) < rules.bound).sum())


def bounded(entropy: Tensor, rules: Rules) -> int:
    """How many of these slots of a row, entropies [n] in their order, fulfil "entropy" or "entropy_sum".

    Neither sum falls as slots come in: the one without the largest grows by the smaller of the new entropy and the
    largest before. So the largest n whose sum fulfils the bound is also the number of sums that do.
    """
    total = largest = found = 0
    for own in units(entropy).tolist():
        total, largest = total + own, max(largest, own)
        spent = total - (largest if rules.rule == "entropy" else own)
        found += int((torch.tensor(spent).float() * UNIT) <= rules.bound)
    return found


def beside(slots: Tensor, confidence: Tensor, rules: Rules) -> Tensor:
    """Whether each of these slots of a row [n], confidences [n], fulfils "near"; bool [n]."""
    anchor = confidence >= rules.bound
    reached = ((slots[:, None] - slots[anchor]).abs() <= rules.radius).any(1)
    return anchor | (reached & (confidence >= rules.near))


def chosen(slots: Tensor, choice: Chosen, count: int, rules: Rules) -> list[int]:
    """Which entries a step fills, of all [n] of a row that may be filled."""
    order = ranked(choice.score).sort(descending=True, stable=True).indices
    may = order[choice.confidence[order] > -torch.inf] if rules.finite_only else order
    known = ranked(choice.confidence[may].float()).clamp(min=torch.finfo(torch.float32).min)
    also: list[int] = []
    if rules.rule in ("threshold", "factor"):
        count = max(count, confident(known, rules))
    elif rules.rule in ENTROPY_RULES:
        count = max(count, bounded(choice.entropy[may], rules))
    elif rules.rule == "near":
        also = may[beside(slots[may], known, rules)].tolist()
    return [*order[: max(count, 0)].tolist(), *also]


def advance_(state: State, table, passed: Pass, choice: Chosen, rules: Rules) -> None:
    for b in range(len(state.masked)):
        tokens, masked, fresh, seen, rank = (x[b] for x in state[:5])
        fresh.fill_(False)
        if not masked.any():
            continue
        seen |= passed.active[b] & ~masked
        slots = passed.scored[b].nonzero()[:, 0][: len(choice.token)]
        first = int(passed.starts[b])
        own = Chosen(*(x if x is None else x[first : first + len(slots)] for x in choice))
        state.invalid[b] |= own.confidence.isnan().any()
        if passed.eligible is not None:
            allowed = passed.eligible[b, slots]
            slots, own = slots[allowed], Chosen(*(x if x is None else x[allowed] for x in own))
        of_row = rules
        if passed.bound is not None and rules.rule in ("threshold", "near"):
            of_row = rules._replace(bound=float(passed.bound[b]))
        for i in chosen(slots, own, int(passed.count[b]), of_row):
            tokens[slots[i]], masked[slots[i]], fresh[slots[i]] = own.token[i], False, True
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
