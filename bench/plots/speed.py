"""Figures of measurements: one function each, which takes a document and returns a figure, or None without data.

A document is what `dkv bench` writes as JSON: {"facts": ..., "comparison" | "floor" | "growth" | "memory": ...}.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dkv.bench.plots import drawing
from dkv.bench.plots.drawing import COLOURS, styles

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
    speeds = [row[end] for row in rows for end in ("slowest", "fastest")]
    drawing.logarithmic(axes, "x", low, 1.35, "{:.0%}")
    drawing.logarithmic(axes, "y", min(speeds) / 1.2, 1.5 * max(speeds), "{:g}x")
    points = [(row, row["computed_share"], row["speed"], row["policy"] * (row["way"] == "dkv")) for row in rows]
    _scatter(axes, points, ranges="y")
    axes.set(xlabel="slots computed, as a share of plain decoding", ylabel="speed against plain decoding by dkv")
    axes.legend(handles=[ideal, *_ways(rows)], loc="lower left")
    return figure


def step_against_slots(found: Row) -> Any:
    """Milliseconds of plain's full steps, and of cached steps, over the slots that they compute."""
    rows, points = _comparison(found), []
    for row in rows:
        kind, name = ("full", "plain (full)") if row["policy"] == "plain" else ("cached", row["policy"])
        named = row["way"] == "dkv" and row["batch"] == rows[-1]["batch"]
        if row[f"{kind}_ms"] and row[f"{kind}_slots"]:
            points.append((row, row[f"{kind}_slots"], row[f"{kind}_ms"], name * named))
    slots, times = ([point[i] for point in points] for i in (1, 2))
    if len(set(slots)) < 2:
        return None
    figure, axes = drawing.figure(found, "Time of a step against the slots that it computes", _canvas_of(rows))
    drawing.logarithmic(axes, "x", min(slots) / 1.3, max(slots) * 1.5, "{:g}")
    drawing.logarithmic(axes, "y", min(times) / 1.4, max(times) * 1.4, "{:g}")
    _scatter(axes, points)
    axes.set(xlabel="slots computed in a step, all rows (median)", ylabel="milliseconds of a step (median)")
    axes.legend(handles=_ways(rows), loc="upper left")
    return figure


def rate_against_batch(found: Row) -> Any:
    """Tokens per second over the batch, by policy."""
    rows = _comparison(found)
    batches = sorted({row["batch"] for row in rows})
    if len(batches) < 2:
        return None
    figure, axes = drawing.figure(found, "Tokens per second against batch", _canvas_of(rows, batch=False))
    style = styles([row["policy"] for row in rows])
    for policy, way in dict.fromkeys((row["policy"], row["way"]) for row in rows):
        own = {row["batch"]: row["tokens_per_second"] for row in rows if (row["policy"], row["way"]) == (policy, way)}
        x, eager = sorted(own), {"ls": ":", "mfc": "white", "label": f"{policy}, {EAGER}"}
        axes.plot(x, [own[b] for b in x], **style[policy], **({"label": policy} if way == "dkv" else eager))
    drawing.logarithmic(axes, "x", batches[0] / 1.05, batches[-1] * 1.05, "{:g}", batches)
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
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.margins(x=0.25)
    axes.set(xlabel="speed against plain decoding", ylabel="problems answered exactly", ylim=(-0.05, 1.1))
    # Above the points: beside them are the ranges.
    _scatter(axes, [(row, row["speed"], row["exact"], row["policy"]) for row in rows], ranges="x", least=6)
    return figure


def growth(found: Row) -> Any:
    """Milliseconds per generated slot over the length of the canvas, with the fitted exponents."""
    rows = found.get("growth", {}).get("rows")
    if not rows:
        return None
    fits = {fit["policy"]: fit for fit in found["growth"]["fits"]}
    figure, axes = drawing.figure(found, "Time per generated slot against length", f"prompt of {rows[0]['prompt']}")
    for policy, style in styles([row["policy"] for row in rows]).items():
        own, label = [row for row in rows if row["policy"] == policy], policy
        if fit := fits.get(policy):
            interval = "" if fit["low"] is None else f" ({fit['low']:.2f} to {fit['high']:.2f})"
            label += f": exponent {fit['exponent']:.2f}{interval}"
        axes.plot(
            [row["prompt"] + row["new"] for row in own], [row["ms_per_slot"] for row in own], label=label, **style
        )
    slots = sorted({row["prompt"] + row["new"] for row in rows})
    times = [row["ms_per_slot"] for row in rows]
    drawing.logarithmic(axes, "x", slots[0] / 1.2, slots[-1] * 1.2, "{:g}", slots)
    drawing.logarithmic(axes, "y", min(times) / 1.3, max(times) * 3, "{:g}")
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
    left = [0.0] * len(rows)
    for number, name in enumerate(dict.fromkeys(name for row in rows for name in row["parts"])):
        widths, colour = [row["parts"].get(name, 0.0) for row in rows], COLOURS[(number + 1) % 9]
        axes.barh(range(len(rows)), widths, 0.5, left, color=colour, edgecolor="white", label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    alone = {"floor_ms": ("floor: the products alone", "-", 2.5)}
    alone["linear_floor_ms"] = ("the same by nn.Linear, not packed", ":", 1.5)
    for place, row in enumerate(rows):
        left[place] = max(left[place], row["linear_floor_ms"] or 0)
        for key, (label, dashes, width) in alone.items():
            if row[key] is not None:
                ends, style = [place - 0.36, place + 0.36], {"color": "black", "ls": dashes, "lw": width}
                axes.plot([row[key]] * 2, ends, label=None if place else label, **style)
        text = f"{row['ratio']:.2f}x floor"
        axes.annotate(text, (left[place], place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [f"{row['kind']}\n{row['active']} of {row['slots']} slots" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of a step", xlim=(0, 1.18 * max(left)))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def latency(found: Row) -> Any:
    """Seconds to the first token and to the last of requests that arrive at random, over the load, by way to serve."""
    rows = [row for row in found.get("serve", {}).get("rows", []) if row["load"] is not None]
    policy = rows[0]["policy"] if rows else None
    ways: dict[str, list[Row]] = {}
    for row in rows:
        if row["policy"] == policy:
            ways.setdefault(row["way"], []).append(row)
    # What was asked at one load alone is no line.
    ways = {way: own for way, own in ways.items() if len(own) > 1}
    if not ways:
        return None
    figure, axes = drawing.figure(found, "Time to the first token (dotted) and in all against load", policy)
    for (way, own), style in zip(ways.items(), styles([*ways]).values(), strict=True):
        loads, label = [row["load"] for row in own], f"{way.partition(',')[0]}, {own[0]['rows']} rows"
        for name, line in (("whole", "-"), ("first", ":")):
            axes.plot(loads, [row[f"{name}_p50"] for row in own], ls=line, label=label, **style)
            axes.plot(loads, [row[f"{name}_p99"] for row in own], ls=line, mfc="white", **style)
            label = None
    ends = ("first_p50", "whole_p99")
    times = [row[name] for own in ways.values() for row in own for name in ends]
    drawing.logarithmic(axes, "y", min(times) / 1.3, max(times) * 2.5, "{:g}")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set(xlabel="load, of what LLM serves if all wait at once", ylabel="seconds: p50 (filled) and p99 (open)")
    axes.legend(loc="upper left", ncols=3)
    return figure


FIGURES: dict[str, Callable[[Row], Any]] = {
    "speed": speed_against_share,
    "steps": step_against_slots,
    "batch": rate_against_batch,
    "accuracy": accuracy_against_speed,
    "growth": growth,
    "floor": floor,
    "latency": latency,
}


def _comparison(found: Row) -> list[Row]:
    return found.get("comparison", {}).get("rows", [])


def _at_one_batch(found: Row) -> list[Row]:
    """The rows of the smallest batch."""
    rows = _comparison(found)
    return [row for row in rows if row["batch"] == min(row["batch"] for row in rows)]


def _scatter(axes: Any, points: Sequence[tuple[Row, float, float, str]], ranges: str = "", least: int = 0) -> None:
    """Points (row, x, y, name or nothing), filled for dkv and open for the baseline.

    Args:
        ranges: the axis along which the range of the speed is drawn; none by default.
        least: as in `drawing.label`.
    """
    style = styles([row["policy"] for row, *_ in points])
    for row, x, y, _ in points:
        own = style[row["policy"]]
        if ranges:
            ends = {"x": [x, x], "y": [y, y], ranges: [row["slowest"], row["fastest"]]}
            axes.plot(ends["x"], ends["y"], color=own["color"], lw=1)
        axes.plot(x, y, mfc=own["color"] if row["way"] == "dkv" else "white", ms=8, **own)
    drawing.label(axes, [(x, y, name, style[row["policy"]]["color"]) for row, x, y, name in points if name], least)


def _ways(rows: Sequence[Row]) -> list[Any]:
    """Legend entries of what filled and open points are."""
    from matplotlib.lines import Line2D

    faces = {"dkv": ("#555555", "dkv"), "eager": ("white", f"{EAGER} of the same policy")}
    kinds = [faces[way] for way in dict.fromkeys(row["way"] for row in rows)]
    return [Line2D([], [], ls="", marker="o", color="#555555", mfc=face, ms=8, label=label) for face, label in kinds]


def _canvas_of(rows: Sequence[Row], batch: bool = True) -> str:
    row, batches = rows[0], sorted({row["batch"] for row in rows})
    size = f"{row['prompt']} + {row['new']} slots, {row['steps']} steps"
    return f"{size}, batch {', '.join(map(str, batches))}" if batch else size
