"""What all figures of measurements share: titles, logarithmic axes in plain numbers, and names beside points."""

from collections.abc import Sequence
from typing import Any

# Okabe and Ito: told apart by colour-blind people, and in grey by their markers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999", "#F0E442")
MARKERS = "osD^vPX*h"


def styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """By name, in their order, colour and marker."""
    names = list(dict.fromkeys(names))
    return {x: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, x in enumerate(names)}


def measured_on(facts: dict[str, Any], *more: str) -> str:
    """On what, in two lines: the model and `more` about the measurement, and the machine."""
    where = facts.get("card") or f"{facts['processor']}, threads: {facts['threads']}"
    what = ", ".join(filter(None, (facts["model"], facts["dtype"], *more)))
    return f"{what}\n{where}, torch {facts['torch']}, {facts['date'][:10]}"


def figure(found: dict[str, Any], title: str, canvas: str) -> tuple[Any, Any]:
    """A figure that says what was measured on what, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, pad=34)
    small = measured_on(found["facts"], canvas)
    axes.text(0, 1.02, small, transform=axes.transAxes, fontsize=8.5, color="#555555")
    plain(axes)
    return figure, axes


def plain(axes: Any) -> None:
    """Axes with a light grid behind what is drawn, and without a box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis; more of them where the range is small."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [digit * 10.0**power for power in range(-4, 8) for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) > 3:
            break
    return found


def logarithmic(axes: Any, name: str, low: float, high: float, form: str, at: Sequence[float] | None = None) -> None:
    """A logarithmic axis from `low` to `high`, its ticks (`at`, or round ones) in plain numbers."""
    at, axis = at or ticks(low, high), getattr(axes, f"{name}axis")
    getattr(axes, f"set_{name}scale")("log")
    axis.set_ticks(at, [form.format(tick) for tick in at])
    axis.set_ticks([], minor=True)
    getattr(axes, f"set_{name}lim")(low, high)


def label(axes: Any, points: Sequence[tuple[float, float, str, str]], least: int = 0) -> None:
    """Names beside points (x, y, name, colour), or so many steps of 2 points above or below, as far as is needed.

    A name that is moved, so as not to cover another, has a line to its point.
    """
    axes.figure.draw_without_rendering()
    scale = axes.figure.dpi / 72
    singles = [line.get_xydata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    # What is taken: left edge, height and width in pixels; at first by the points.
    taken = [(x - 5 * scale, y, 10 * scale) for x, y in map(axes.transData.transform, singles)]
    for x, y, name, colour in sorted(points, key=lambda point: (point[1], -point[0])):
        left, here = axes.transData.transform((x, y))
        left, width = left + 8 * scale, (5.5 * len(name) + 10) * scale

        def free(up: float, left=left, here=here, width=width) -> bool:
            near = [(start, size) for start, height, size in taken if abs(here + up - height) < 11 * scale]
            return not any(left < start + size and start < left + width for start, size in near)

        up = next(up for i in range(least, 1000) for up in (2 * scale * i, -2 * scale * i) if free(up))
        taken.append((left, here + up, width))
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        text = {"va": "center", "fontsize": 9, "color": colour, "arrowprops": line if up else None}
        axes.annotate(name, (x, y), (16 if up else 10, up / scale), textcoords="offset points", **text)
