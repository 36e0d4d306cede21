"""Answers and texts against speed: the table of `dkv eval` and its meaning in words."""

from collections.abc import Sequence
from typing import Any

from dkv.bench import report
from dkv.bench.accuracy.intervals import enough, wilson
from dkv.bench.lineup import PLAIN

Row = dict[str, Any]
HALF = f"{PLAIN} half"
# Points that a reader may want to give away.
LOSSES = (0.5, 3.0)
# Nats a token by which a text may be less, or more, likely than another and count as alike.
ALIKE = 0.05


def table(rows: Sequence[Row]) -> str:
    """A line per contender; what was not measured has no column."""
    cells = {"": "{label}", "tokens/s": "{tokens_per_second:.0f}", "speed": "{speed:.2f}x"}
    cells |= {"computed": "{computed_share:.0%}", "exact": "{exact:.1%}", "95 % interval": "{low:.1%} to {high:.1%}"}
    cells["points lost or won"] = _against_plain("{change:+.1f} ({change_low:+.1f} to {change_high:+.1f})")
    # With one task its column would repeat the one of all.
    tasks = list(rows[0]["tasks"])
    cells |= {task: f"{{tasks[{task}]:.1%}}" for task in (tasks if len(tasks) > 1 else [])}
    cells["nats a token"] = "{nats:.3f}"
    cells["against plain"] = _against_plain("{nats_change:+.3f} ({nats_low:+.3f} to {nats_high:+.3f})")
    cells["repeated"] = "{repeated:.0%}"
    return report.table(rows, cells)


def _against_plain(column: str) -> report.Cell:
    return lambda row: "" if row["label"] == PLAIN else report.cell(column, row)


# Measures of which less is better.
LESS = ("computed_share", "nats")


def frontier(rows: Sequence[Row], by: str = "tokens_per_second", of: str = "exact") -> list[Row]:
    """The rows that no other beats in both `of`, which is exact or nats, and `by`.

    Of rows whose texts count as alike the fastest stands for all.
    """
    margin = ALIKE if of == "nats" else 0.0

    def rank(row: Row, name: str) -> float:
        return -row[name] if name in LESS else row[name]

    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (-rank(row, by), -rank(row, of))):
        if not kept or rank(row, of) > rank(kept[-1], of) + margin:
            kept.append(row)
    return kept


def verdict(rows: Sequence[Row]) -> str:
    """What is lost and what is won, as far as the intervals tell."""
    said = [_of_answers(rows)] if rows[0]["problems"] else []
    return "\n".join([*said, *([_of_texts(rows)] if rows[0].get("texts") else [])])


def _of_texts(rows: Sequence[Row]) -> str:
    """The fastest whose texts the model finds as likely as those of plain decoding."""
    alike = [row for row in rows if row["label"] != PLAIN and abs(row["nats_change"]) <= ALIKE]
    words = f"texts within {ALIKE:g} nats a token of those of plain decoding"
    if not alike:
        return f"None has {words}."
    best = _fastest(alike)
    found = f"{best['nats_change']:+.3f} ({best['nats_low']:+.3f} to {best['nats_high']:+.3f})"
    return f"Fastest with {words}: {best['label']}, {best['speed']:.2f}x plain, {found}."


def _of_answers(rows: Sequence[Row]) -> str:
    """What is lost in answers, and whether a cache is better than fewer steps."""
    own = {row["label"]: row for row in rows}
    plain, half = own[PLAIN], own.get(HALF)
    cached = [row for row in rows if row["policy"] != "none"]
    if said := too_hard(plain):
        return said
    said = [_within(points, cached) for points in LOSSES] if cached else ["No cache was measured."]
    if half is not None:
        said.append(f"Half the steps, no cache: {_said(half)}.")
    if half is not None and cached:
        said.append(_against_half(half, cached))
    return "\n".join(said)


def too_hard(plain: Row) -> str:
    """That nothing can be said of answers, where plain decoding may have no more right than a loss that is accepted."""
    right, count = plain["right"], plain["problems"]
    if count == 0 or 100 * wilson(right, count)[0] > max(LOSSES):
        return ""
    found = f"Plain decoding answers {right or 'none'} of the {count} problems"
    return f"{found}: accuracy cannot tell settings apart here."


def _within(points: float, cached: Sequence[Row]) -> str:
    """The fastest of the caches that do not lose more, as far as so small a loss can be told from none."""
    words = f"at most {points:g} points lost"
    if good := [row for row in cached if row["change"] >= -points and _width(row) <= points]:
        return f"Fastest cache with {words}: {_said(_fastest(good))}."
    open_ = [row for row in cached if row["change_high"] >= -points]
    if not open_:
        return f"No cache with {words}."
    return f"{_too_few(min(open_, key=_width), points)} whether a cache has {words}."


def _against_half(half: Row, cached: Sequence[Row]) -> str:
    """Whether a cache is at least as fast and as exact as half the steps."""
    better = [row for row in cached if row["speed"] >= half["speed"] and row["exact"] >= half["exact"]]
    widest = max((half, *better), key=_width)
    if _width(widest) > max(LOSSES):
        return f"{_too_few(widest, max(LOSSES))} whether a cache is better."
    if better:
        return f"A cache is better: {_said(_fastest(better))}."
    return "No cache is at least as fast and at least as exact."


def _too_few(row: Row, points: float) -> str:
    needed = enough(_width(row), row["problems"], points)
    # Two digits of it mean something.
    needed = round(needed, 2 - len(str(needed)))
    return f"Too few problems ({row['problems']}, +-{_width(row):.1f} points; about {needed} would do) to tell"


def _width(row: Row) -> float:
    """Half of the interval, in points."""
    return (row["change_high"] - row["change_low"]) / 2


def _fastest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row["speed"])


def _said(row: Row) -> str:
    interval = f"{row['change_low']:+.1f} to {row['change_high']:+.1f}"
    return f"{row['label']}, {row['speed']:.2f}x plain, {row['change']:+.1f} points ({interval})"
