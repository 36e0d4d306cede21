"""What all figures of `dkv bench` share: titles, logarithmic axes in plain numbers, and names beside points."""

from collections.abc import Iterable, Sequence
from typing import Any

# Okabe and Ito: told apart by colour-blind people, and in grey by their markers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999", "#F0E442")
MARKERS = "osD^vPX*h"


def figure(found: dict[str, Any], title: str, canvas: str) -> tuple[Any, Any]:
    """A figure that says what was measured on what."""
    from matplotlib.figure import Figure

    facts = found["facts"]
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    where = facts.get("card") or f"{facts['processor']}, threads: {facts['threads']}"
    what = ", ".join(filter(None, (facts["model"], facts["dtype"], canvas)))
    axes.set_title(title, loc="left", fontsize=12, pad=34)
    small = f"{what}\n{where}, torch {facts['torch']}, {facts['date'][:10]}"
    axes.text(0, 1.02, small, transform=axes.transAxes, fontsize=8.5, color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis; more of them where the range is small."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [digit * 10.0**power for power in range(-4, 8) for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 3:
            break
    return ticks


def logarithmic(axes: Any, name: str, ticks: Iterable[float], form: str) -> None:
    """A logarithmic axis with its ticks in plain numbers."""
    ticks = list(ticks)
    axis = getattr(axes, f"{name}axis")
    getattr(axes, f"set_{name}scale")("log")
    axis.set_ticks(ticks, [form.format(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def label(axes: Any, points: Sequence[tuple[float, float, str, str]], least: int = 0) -> None:
    """Names beside points (x, y, name, colour), or so many steps of 2 points above or below, as far as is needed.

    A name that is moved, so as not to cover another, has a line to its point.
    """
    axes.figure.draw_without_rendering()
    scale = axes.figure.dpi / 72
    # What is taken: left edge, height and width in pixels; at first by the points.
    taken = []
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            x, y = axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))
            taken.append((x - 5 * scale, y, 10 * scale))
    for x, y, name, colour in sorted(points, key=lambda point: (point[1], -point[0])):
        left, here = axes.transData.transform((x, y))
        left, width = left + 8 * scale, (5.5 * len(name) + 10) * scale
        up = next(
            up
            for distance in range(least, 1000)
            for up in (2 * scale * distance, -2 * scale * distance)
            if not any(
                abs(here + up - other) < 11 * scale and left < other_left + other_width and other_left < left + width
                for other_left, other, other_width in taken
            )
        )
        taken.append((left, here + up, width))
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            name,
            (x, y),
            (16 if up else 10, up / scale),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops=line if up else None,
        )
