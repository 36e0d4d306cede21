"""Figures of measurements: one function each, which takes a document and returns a figure, or None without data.

A document is what `dkv bench` writes as JSON: {"facts": ..., "comparison" | "floor" | "growth" | "memory": ...}.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dkv.bench.plots import drawing
from dkv.bench.plots.drawing import COLOURS, MARKERS

Row = dict[str, Any]
EAGER = "eager baseline"


def speed_against_share(found: Row) -> Any:
    """Speed of the policies over the computed share, with the line of a step that costs what it computes."""
    rows = _at_one_batch(found)
    if len({row["policy"] for row in rows}) < 2:
        return None
    figure, axes = drawing.figure(found, "Speed against computed share", _canvas_of(rows))
    low = min(row["computed_share"] for row in rows) / 1.3
    (ideal,) = axes.plot([low, 1], [1 / low, 1], color="#999999", lw=1, ls="--", label="ideal: 1 / share")
    for row in rows:
        style = _style(rows, row)
        axes.plot([row["computed_share"]] * 2, [row["slowest"], row["fastest"]], color=style[0], lw=1)
        _point(axes, row, row["computed_share"], row["speed"], style)
    speeds = [row[end] for row in rows for end in ("slowest", "fastest")]
    drawing.logarithmic(axes, "x", drawing.ticks(low, 1.15), "{:.0%}")
    drawing.logarithmic(axes, "y", drawing.ticks(min(speeds) / 1.2, 1.5 * max(speeds)), "{:g}x")
    axes.set(
        xlabel="slots computed, as a share of plain decoding",
        ylabel="speed against plain decoding by dkv",
        xlim=(low, 1.35),
        ylim=(min(speeds) / 1.2, 1.5 * max(speeds)),
    )
    axes.legend(handles=[ideal, *_ways(rows)], loc="lower left")
    drawing.label(
        axes, [(r["computed_share"], r["speed"], r["policy"], _style(rows, r)[0]) for r in rows if r["way"] == "dkv"]
    )
    return figure


def step_against_slots(found: Row) -> Any:
    """Milliseconds of plain's full steps, and of cached steps, over the slots that they compute."""
    rows, points = _comparison(found), []
    for row in rows:
        kind = "full" if row["policy"] == "plain" else "cached"
        if row[f"{kind}_ms"] and row[f"{kind}_slots"]:
            points.append((row, row[f"{kind}_slots"], row[f"{kind}_ms"]))
    slots, times = ([point[i] for point in points] for i in (1, 2))
    if len(set(slots)) < 2:
        return None
    figure, axes = drawing.figure(found, "Time of a step against the slots that it computes", _canvas_of(rows))
    for row, x, y in points:
        _point(axes, row, x, y, _style(rows, row))
    drawing.logarithmic(axes, "x", drawing.ticks(min(slots) / 1.3, max(slots) * 1.5), "{:g}")
    drawing.logarithmic(axes, "y", drawing.ticks(min(times) / 1.4, max(times) * 1.4), "{:g}")
    axes.set(
        xlabel="slots computed in a step, all rows (median)",
        ylabel="milliseconds of a step (median)",
        xlim=(min(slots) / 1.3, max(slots) * 1.5),
        ylim=(min(times) / 1.4, max(times) * 1.4),
    )
    axes.legend(handles=_ways(rows), loc="upper left")
    drawing.label(
        axes,
        [
            (x, y, row["policy"] + " (full)" * (row["policy"] == "plain"), _style(rows, row)[0])
            for row, x, y in points
            if row["way"] == "dkv" and row["batch"] == rows[-1]["batch"]
        ],
    )
    return figure


def rate_against_batch(found: Row) -> Any:
    """Tokens per second over the batch, by policy."""
    rows = _comparison(found)
    batches = sorted({row["batch"] for row in rows})
    if len(batches) < 2:
        return None
    figure, axes = drawing.figure(found, "Tokens per second against batch", _canvas_of(rows, batch=False))
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        lines.setdefault((row["policy"], row["way"]), []).append(row)
    for (policy, way), own in lines.items():
        colour, marker = _style(rows, own[0])
        axes.plot(
            [row["batch"] for row in own],
            [row["tokens_per_second"] for row in own],
            color=colour,
            marker=marker,
            ls="-" if way == "dkv" else ":",
            mfc=colour if way == "dkv" else "white",
            label=policy if way == "dkv" else f"{policy}, {EAGER}",
        )
    drawing.logarithmic(axes, "x", batches, "{:g}")
    most = max(row["tokens_per_second"] for row in rows)
    axes.set(xlabel="batch (rows)", ylabel="tokens per second, all rows", ylim=(0, 1.45 * most))
    axes.legend(loc="upper left", ncols=2)
    return figure


def accuracy_against_speed(found: Row) -> Any:
    """Share of the problems answered exactly, over the speed."""
    rows = [row for row in _at_one_batch(found) if row["exact"] is not None]
    if not rows:
        return None
    figure, axes = drawing.figure(found, "Exact answers against speed", _canvas_of(rows))
    axes.axvline(1, color="#999999", lw=1, ls="--")
    for row in rows:
        colour, marker = _style(rows, row)
        axes.plot([row["slowest"], row["fastest"]], [row["exact"]] * 2, color=colour, lw=1)
        axes.plot(row["speed"], row["exact"], color=colour, marker=marker, ms=8)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.margins(x=0.25)
    axes.set(xlabel="speed against plain decoding", ylabel="problems answered exactly", ylim=(-0.05, 1.1))
    # Above the points: beside them are the ranges.
    drawing.label(axes, [(row["speed"], row["exact"], row["policy"], _style(rows, row)[0]) for row in rows], least=6)
    return figure


def growth(found: Row) -> Any:
    """Milliseconds per generated slot over the length of the canvas, with the fitted exponents."""
    rows = found.get("growth", {}).get("rows")
    if not rows:
        return None
    fits = {fit["policy"]: fit for fit in found["growth"]["fits"]}
    figure, axes = drawing.figure(found, "Time per generated slot against length", f"prompt of {rows[0]['prompt']}")
    for number, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        own = [row for row in rows if row["policy"] == policy]
        label = policy
        if policy in fits:
            fit = fits[policy]
            interval = "" if fit["low"] is None else f" ({fit['low']:.2f} to {fit['high']:.2f})"
            label += f": exponent {fit['exponent']:.2f}{interval}"
        x, y = [row["prompt"] + row["new"] for row in own], [row["ms_per_slot"] for row in own]
        axes.plot(x, y, f"-{MARKERS[number % 9]}", color=COLOURS[number % 9], label=label)
    slots = sorted({row["prompt"] + row["new"] for row in rows})
    times = [row["ms_per_slot"] for row in rows]
    drawing.logarithmic(axes, "x", slots, "{:g}")
    drawing.logarithmic(axes, "y", drawing.ticks(min(times) / 1.3, max(times) * 3), "{:g}")
    axes.set(xlabel="slots of the canvas (prompt + new)", ylabel="milliseconds per generated slot")
    axes.legend(loc="upper left")
    return figure


def floor(found: Row) -> Any:
    """What a full and a cached step are made of, beside the matrix products alone."""
    rows = found.get("floor", {}).get("rows")
    if not rows:
        return None
    title = "Parts of a step, and the matrix products alone (its floor)"
    figure, axes = drawing.figure(found, title, f"batch {rows[0]['batch']}")
    axes.grid(visible=False, axis="y")
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    left = [0.0] * len(rows)
    for number, name in enumerate(names):
        widths = [row["parts"].get(name, 0.0) for row in rows]
        axes.barh(range(len(rows)), widths, 0.5, left, color=COLOURS[(number + 1) % 9], edgecolor="white", label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        label = "floor: the products alone" if place == 0 else None
        axes.plot([row["floor_ms"]] * 2, [place - 0.36, place + 0.36], color="black", lw=2.5, label=label)
        if row["linear_floor_ms"] is not None:
            linear = "the same by nn.Linear, not packed" if place == 0 else None
            ends = [place - 0.36, place + 0.36]
            axes.plot([row["linear_floor_ms"]] * 2, ends, color="black", lw=1.5, ls=":", label=linear)
        axes.annotate(
            f"{row['ratio']:.2f}x floor",
            (max(left[place], row["linear_floor_ms"] or 0), place),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(rows)), [f"{row['kind']}\n{row['active']} of {row['slots']} slots" for row in rows])
    axes.invert_yaxis()
    widest = max(left + [row["linear_floor_ms"] or 0 for row in rows])
    axes.set(xlabel="milliseconds of a step", xlim=(0, 1.18 * widest))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


FIGURES: dict[str, Callable[[Row], Any]] = {
    "speed": speed_against_share,
    "steps": step_against_slots,
    "batch": rate_against_batch,
    "accuracy": accuracy_against_speed,
    "growth": growth,
    "floor": floor,
}


def _comparison(found: Row) -> list[Row]:
    return found.get("comparison", {}).get("rows", [])


def _at_one_batch(found: Row) -> list[Row]:
    """The rows of the smallest batch."""
    rows = _comparison(found)
    return [row for row in rows if row["batch"] == min(row["batch"] for row in rows)]


def _style(rows: Sequence[Row], row: Row) -> tuple[str, str]:
    """Colour and marker of a policy."""
    number = list(dict.fromkeys(row["policy"] for row in rows)).index(row["policy"])
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _point(axes: Any, row: Row, x: float, y: float, style: tuple[str, str]) -> None:
    """A point of a comparison, filled for dkv and open for the baseline."""
    colour, marker = style
    axes.plot(x, y, color=colour, marker=marker, mfc=colour if row["way"] == "dkv" else "white", ms=8)


def _ways(rows: Sequence[Row]) -> list[Any]:
    """Legend entries of what filled and open points are."""
    from matplotlib.lines import Line2D

    faces = {"dkv": ("#555555", "dkv"), "eager": ("white", f"{EAGER} of the same policy")}
    kinds = [faces[way] for way in dict.fromkeys(row["way"] for row in rows)]
    return [Line2D([], [], ls="", marker="o", color="#555555", mfc=face, ms=8, label=label) for face, label in kinds]


def _canvas_of(rows: Sequence[Row], batch: bool = True) -> str:
    row = rows[0]
    batches = sorted({row["batch"] for row in rows})
    size = f"{row['prompt']} + {row['new']} slots, {row['steps']} steps"
    return f"{size}, batch {', '.join(map(str, batches))}" if batch else size
