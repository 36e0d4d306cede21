"""Exact answers against speed: the table, its meaning in words, and the figure of `dkv eval`."""

from collections.abc import Sequence
from typing import Any

from dkv.bench import drawing
from dkv.bench.contenders import PLAIN
from dkv.bench.intervals import enough
from dkv.bench.plots import COLOURS, MARKERS
from dkv.bench.report import columns

Row = dict[str, Any]
HALF = f"{PLAIN} half"
# Points that a reader may want to give away.
LOSSES = (0.5, 3.0)
# Up to so many points have their names beside them; of more, those on the frontier.
NAMED = 20
WORDS = {"none": "no cache"}


def table(rows: Sequence[Row]) -> str:
    """A line per contender."""
    tasks = list(rows[0]["tasks"])
    header = ["", "tokens/s", "speed", "computed", "exact", "95 % interval", "points lost or won", *tasks]
    lines = []
    for row in rows:
        change = f"{row['change']:+.1f} ({row['change_low']:+.1f} to {row['change_high']:+.1f})"
        line = [row["label"], f"{row['tokens_per_second']:.0f}", f"{row['speed']:.2f}x", f"{row['computed_share']:.0%}"]
        line += [f"{row['exact']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}"]
        line += ["" if row["label"] == PLAIN else change, *(f"{row['tasks'][task]:.1%}" for task in tasks)]
        lines.append(line)
    # With one task its column would repeat the one of all.
    cut = None if len(tasks) > 1 else -1
    return columns(header[:cut], [line[:cut] for line in lines])


def frontier(rows: Sequence[Row], by: str = "tokens_per_second") -> list[Row]:
    """The rows that no other beats in both exact answers and `by` (computed_share: less is better)."""
    sign = -1 if by == "computed_share" else 1
    ordered = sorted(rows, key=lambda row: (-sign * row[by], -row["exact"]))
    kept: list[Row] = []
    for row in ordered:
        if not kept or row["exact"] > kept[-1]["exact"]:
            kept.append(row)
    return kept


def verdict(rows: Sequence[Row]) -> str:
    """What is lost, what is won, and whether a cache is better than fewer steps, as far as the intervals tell."""
    own = {row["label"]: row for row in rows}
    plain, half = own[PLAIN], own.get(HALF)
    cached = [row for row in rows if row["policy"] != "none"]
    if plain["right"] == 0:
        return f"Plain decoding answers none of the {plain['problems']} problems: nothing can be lost on them."
    said = [_within(points, cached) for points in LOSSES] if cached else ["No cache was measured."]
    if half is not None:
        said.append(f"Half the steps, no cache: {_said(half)}.")
    if half is not None and cached:
        said.append(_against_half(half, cached))
    return "\n".join(said)


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


def draw(found: Row) -> Any:
    """Two panels over the same exact answers: tokens per second, and the computed share."""
    from matplotlib.figure import Figure

    rows, facts = found["rows"], found["facts"]
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    where = facts.get("card") or f"{facts['processor']}, threads: {facts['threads']}"
    problems = f"{rows[0]['problems']} problems ({', '.join(rows[0]['tasks'])}), batch {facts['batch']}"
    small = f"{facts['model']}, {facts['dtype']}, {problems}; {where}, torch {facts['torch']}, {facts['date'][:10]}"
    figure.suptitle(f"Exact answers against speed and work\n{small}", fontsize=10, x=0.01, ha="left")
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for axes, by in ((left, "tokens_per_second"), (right, "computed_share")):
        _panel(axes, rows, by, policies)
    values = [row["tokens_per_second"] for row in rows]
    shares = [row["computed_share"] for row in rows]
    # Room for names to the right of the points.
    drawing.logarithmic(left, "x", drawing.ticks(min(values) / 1.2, max(values) * 1.6), "{:g}")
    drawing.logarithmic(right, "x", drawing.ticks(min(shares) / 1.6, max(shares) * 1.1), "{:.0%}")
    left.set(
        xlabel="new slots per second", ylabel="problems answered exactly", xlim=(min(values) / 1.2, max(values) * 1.6)
    )
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    right.set(
        xlabel="slots computed, as a share of plain decoding (fewer to the right)",
        xlim=(max(shares) * 1.1, min(shares) / 1.6),
    )
    figure.draw_without_rendering()
    for axes, by in ((left, "tokens_per_second"), (right, "computed_share")):
        named = rows if len(rows) <= NAMED else frontier(rows, by)
        drawing.label(axes, [(r[by], r["exact"], r["label"], _colour(policies, r)) for r in named], least=4)
    figure.legend(handles=_legend(policies, rows), loc="outside lower center", ncols=len(policies) + 3, frameon=False)
    return figure


def _panel(axes: Any, rows: Sequence[Row], by: str, policies: Sequence[str]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.7)
    best = sorted(frontier(rows, by), key=lambda row: row[by])
    axes.plot([row[by] for row in best], [row["exact"] for row in best], color="#bbbbbb", lw=3, zorder=1)
    for row in rows:
        colour = _colour(policies, row)
        axes.plot([row[by]] * 2, [row["low"], row["high"]], color=colour, lw=0.8, alpha=0.6)
        face = "white" if row["settings"]["steps"] is not None else colour
        marker = MARKERS[policies.index(row["policy"]) % len(MARKERS)]
        marker = marker if row["settings"].get("confidence") != "random" else "x"
        axes.plot(row[by], row["exact"], color=colour, marker=marker, mfc=face, ms=7, zorder=2)


def _colour(policies: Sequence[str], row: Row) -> str:
    return COLOURS[policies.index(row["policy"]) % len(COLOURS)]


def _legend(policies: Sequence[str], rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)],
               label=WORDS.get(name, name))
        for i, name in enumerate(policies)
    ]  # fmt: skip
    grey = {"ls": "", "color": "#555555"}
    if any(row["settings"]["steps"] is not None for row in rows):
        handles.append(Line2D([], [], marker="o", mfc="white", label="fewer steps", **grey))
    if any(row["settings"].get("confidence") == "random" for row in rows):
        handles.append(Line2D([], [], marker="x", label="random order", **grey))
    handles.append(Line2D([], [], color="#bbbbbb", lw=3, label="frontier"))
    return handles
