"""`plan_pass`, `pack_pass`, `with_masked_window`: their arguments, and their checks."""

from torch import Tensor

from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import BOOLS, LONGS
from dkv.kernels.common.operation import Operation
from dkv.kernels.plan import reference
from dkv.kernels.plan.reference import ELIGIBLE, FIELDS, KINDS


def _empty_plan(now, masked, rank, lengths, *others):
    masks = [masked.new_empty(masked.shape) for _ in range(3)]
    eligible = masks[2] if others[5] in ELIGIBLE else None
    return *masks[:2], eligible, lengths.new_empty(lengths.shape), lengths.new_empty(5, len(lengths))


def _empty_pack(tokens, active, scored, lengths, report, total, scored_total, shifted):
    sizes = [(total,)] * 3 + [(scored_total,)] * 3 + [(2, len(lengths))]
    return tuple(tokens.new_empty(size) for size in sizes)


PLAN = Operation(reference.plan, _empty_plan)
PACK = Operation(reference.pack, _empty_pack)
WINDOW = Operation(reference.with_masked_window, lambda chosen, *_: chosen.new_empty(chosen.shape))


def plan_pass(
    now: Tensor,
    masked: Tensor,
    rank: Tensor,
    lengths: Tensor,
    active: Tensor,
    *,
    cut: Tensor,
    invalid: Tensor,
    chosen: Tensor | None = None,
    everything: Tensor | None = None,
    kind: str = "open",
    dynamic: bool = False,
    by_chance: bool = False,
    shifted: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The slots that a pass computes, scores and may fill.

    Open are the masked slots of the block that a row is in. A slot is reached if its prediction is computed: by
    itself, or in a shifted model by the slot before it. Of a row without a masked slot nothing is computed.

    Args:
        now: int64 [B, 7], the step of every row; its columns are `dkv.kernels.plan.reference.FIELDS`.
        masked: bool [B, S], slots without a token.
        rank: int64 [B, S], slots to fill counted from the left of their row, from 0; -1 elsewhere.
        lengths: int64 [B], slots of each row.
        active: bool [B, S], slots to compute where a step is not full.
        cut: int64 [B], reported as it is.
        invalid: bool [B], reported as 0 or 1.
        chosen: bool [B, S], the slots that a policy has chosen; of "window" and "chosen".
        everything: bool [B, S], slots to compute where a step is full; None: all of the row.
        kind: what is scored: "open", the open slots that are reached, in rows that fill some of them; "window", those
            in any row, of which only the chosen ones may be filled, or where the step is full all open ones;
            "chosen", the chosen ones; "masks", all masked slots that are reached, of which the open ones may be filled.
        dynamic: every row fills at least one slot.
        by_chance: no row is held to a count.
        shifted: the output of a slot predicts the next one.

    Returns:
        active: bool [B, S], slots to compute.
        scored: bool [B, S], slots to choose a token for.
        eligible: bool [B, S], slots that may be filled; None where these are the scored ones.
        count: int64 [B], how many are filled; S if by chance.
        report: int64 [5, B], of every row its active, scored and masked slots, `cut` and `invalid`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the kind is unknown, or it needs `chosen`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind in ("window", "chosen") and chosen is None:
        raise ValueError(f"chosen must be given with kind={kind!r}")
    b, s = checks.shape("masked", masked, None, None)
    checks.fit(
        {
            "masked": (masked, BOOLS, (b, s)),
            "now": (now, LONGS, (b, len(FIELDS))),
            "rank": (rank, LONGS, (b, s)),
            "lengths": (lengths, LONGS, (b,)),
            "active": (active, BOOLS, (b, s)),
            "cut": (cut, LONGS, (b,)),
            "invalid": (invalid, BOOLS, (b,)),
            "chosen": (chosen, BOOLS, (b, s)),
            "everything": (everything, BOOLS, (b, s)),
        }
    )
    given = (now, masked, rank, lengths, active, chosen, everything, cut, invalid)
    computed, scored, eligible, count, report = PLAN(*given, kind, dynamic, by_chance, shifted)
    return computed, scored, eligible if kind in ELIGIBLE else None, count, report


def pack_pass(
    tokens: Tensor,
    active: Tensor,
    scored: Tensor,
    lengths: Tensor,
    report: Tensor,
    total: int,
    scored_total: int,
    *,
    shifted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The entries of a pass: the active slots of all rows one after the other, filled up at the end.

    Args:
        tokens: int64 [B, S + 1]; the last slot of a row is a spare one.
        active, scored: bool [B, S], of `plan_pass`.
        lengths: int64 [B], slots of each row.
        report: int64 [5, B], of `plan_pass`: its first two lines count `active` and `scored`.
        total, scored_total: T and R, as a rule at least the sums of these; of more slots only the first are there.
        shifted: the output of a slot predicts the next one.

    Returns:
        tokens, positions, rows: int64 [T], of every entry its token, slot and row. Those that fill up have the spare
            slot of row 0.
        slots, scored_rows, places: int64 [R], of every scored slot its number, its row, and the entry that predicts
            it. Those that fill up have slot S, row 0 and place 0.
        starts: int64 [2, B], the first entry and the first scored slot of every row.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a total is negative, or not 0 without rows.
    """
    b, s = checks.shape("active", active, None, None)
    checks.fit(
        {
            "tokens": (tokens, LONGS, (b, s + 1)),
            "active": (active, BOOLS, (b, s)),
            "scored": (scored, BOOLS, (b, s)),
            "lengths": (lengths, LONGS, (b,)),
            "report": (report, LONGS, (5, b)),
        }
    )
    for name, size in (("total", total), ("scored_total", scored_total)):
        if size < 0 or (size > 0 and b == 0):
            raise ValueError(f"{name} must be at least 0, and 0 where there are no rows, got {size}")
    return PACK(tokens, active, scored, lengths, report, total, scored_total, shifted)


def with_masked_window(chosen: Tensor, masked: Tensor, centers: Tensor, window: int) -> Tensor:
    """`chosen` and, for each of the `centers`, the `window` nearest masked slots not yet chosen.

    Of two equally near slots the left one comes first; the windows are filled one after the other.

    Args:
        chosen, masked: bool [B, S].
        centers: int64 [B, n], ragged rows filled up with S.
        window: slots for every center.

    Returns:
        bool [B, S].

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the window is negative.
    """
    b, s = checks.shape("chosen", chosen, None, None)
    checks.fit(
        {
            "chosen": (chosen, BOOLS, (b, s)),
            "masked": (masked, BOOLS, (b, s)),
            "centers": (centers, LONGS, (b, None)),
        }
    )
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    return WINDOW(chosen, masked, centers, window)
