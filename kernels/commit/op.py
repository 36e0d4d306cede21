"""`commit_` and `advance_`: their arguments, and their checks."""

import torch
from torch import Tensor

from dkv.kernels.commit import reference
from dkv.kernels.commit.reference import Chosen, Pass, Rules, State
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import BOOLS, FLOATS, INTEGERS, LONGS
from dkv.kernels.common.operation import Operation
from dkv.kernels.plan.reference import FIELDS

COMMIT = Operation(reference.commit_, lambda *args: torch.empty_like(args[3]), mutates=("canvas",))
ADVANCE = Operation(
    reference.advance_, lambda *_: None, mutates=[f"state_{name}" for name in State._fields if name != "rank"]
)


def commit_(
    canvas: Tensor,
    token: Tensor,
    log_confidence: Tensor,
    eligible: Tensor,
    count: Tensor,
    *,
    positions: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """Write the tokens of the `count` most confident eligible slots of every row, in place.

    Args:
        canvas: [B, S] int64 token ids.
        token, log_confidence, eligible: [B, N] int64, float and bool, of the slots in `positions`.
        count: [B] integers; a row with fewer eligible slots commits those it has.
        positions: [B, N] int64, ascending where eligible; None: N = S, every slot in order. Equal
            confidences go to the lowest position, and NaN counts as -inf.
        validate: check that the positions are in range and no eligible confidence is NaN.

    Returns:
        [B, N] bool, which entries were committed.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a confidence is NaN.
        IndexError: a position is outside 0..S-1.
    """
    b, s = checks.shape("canvas", canvas, None, None)
    n = s if positions is None else positions.shape[-1]
    for name, x in (("token", token), ("log_confidence", log_confidence), ("eligible", eligible)):
        checks.shape(name, x, b, n)
    checks.shape("count", count, b)
    checks.dtype("count", count, INTEGERS)
    checks.same_dtype(canvas=canvas, token=token)
    checks.dtype("log_confidence", log_confidence, FLOATS)
    checks.dtype("eligible", eligible, (torch.bool,))
    checks.same_device(
        canvas=canvas, token=token, log_confidence=log_confidence, eligible=eligible, count=count, positions=positions
    )
    if positions is not None:
        checks.shape("positions", positions, b, n)
        checks.dtype("positions", positions, (torch.int64,))
    if validate:
        if positions is not None:
            checks.index_range("positions", positions, s)
        if bool((log_confidence.isnan() & eligible).any()):
            raise ValueError("log_confidence is NaN at an eligible slot: look for NaN in the logits")
    return COMMIT(canvas, token, log_confidence, eligible, count, positions)


def advance_(state: State, table: Tensor, passed: Pass, choice: Chosen, rules: Rules) -> None:
    """Take the step that was computed, in place: fill the best slots, go on in the schedule, cut rows at their ends.

    The `count` eligible slots of highest score are filled, of equal ones the lower slot first; NaN counts as -inf. A
    row whose block has no masked slot left goes on to the next block. A row ends at the first of its filled slots
    that holds an end token and has no masked slot before it: all of them after that take the padding. A row without a
    masked slot stays as it is.

    Args:
        state: of the rows.
        table: int64 [B, L, 7], the schedules; the columns are `dkv.kernels.plan.reference.FIELDS`.
        passed: what was computed.
        choice: the tokens found, and how sure they are.
        rules: how many slots are filled, and what ends a row.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the rule is unknown, or it needs entropies.
    """
    b, s = checks.shape("state.masked", state.masked, None, None)
    slots, rows, entries, fields = (b, s), (b,), (len(choice.token),), len(FIELDS)
    checks.fit(
        {
            "state.masked": (state.masked, BOOLS, slots),
            "state.fresh": (state.fresh, BOOLS, slots),
            "state.seen": (state.seen, BOOLS, slots),
            "state.tokens": (state.tokens, LONGS, (b, s + 1)),
            "state.rank": (state.rank, LONGS, slots),
            "state.at": (state.at, LONGS, rows),
            "state.now": (state.now, LONGS, (b, fields)),
            "state.cut": (state.cut, LONGS, rows),
            "state.invalid": (state.invalid, BOOLS, rows),
            "table": (table, LONGS, (b, None, fields)),
            "passed.active": (passed.active, BOOLS, slots),
            "passed.scored": (passed.scored, BOOLS, slots),
            "passed.eligible": (passed.eligible, BOOLS, slots),
            "passed.count": (passed.count, LONGS, rows),
            "passed.starts": (passed.starts, LONGS, rows),
            "passed.bound": (passed.bound, FLOATS, rows),
            "choice.token": (choice.token, LONGS, entries),
            "choice.confidence": (choice.confidence, FLOATS, entries),
            "choice.score": (choice.score, FLOATS, entries),
            "choice.entropy": (choice.entropy, FLOATS, entries),
            "rules.ends": (rules.ends, LONGS, (None,)),
        }
    )
    if rules.rule not in reference.RULES:
        raise ValueError(f"rules.rule must be one of {', '.join(reference.RULES)}, got {rules.rule!r}")
    if rules.rule in reference.ENTROPY_RULES and choice.entropy is None:
        raise ValueError(f"rules.rule {rules.rule!r} needs choice.entropy")
    ADVANCE(state, table, passed, choice, rules)
