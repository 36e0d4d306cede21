"""The heat map of a trace: steps from top to bottom, slots from left to right. matplotlib draws it (extra `bench`)."""

from importlib.util import find_spec
from typing import Any

import numpy as np

from dkv.tools.trace.record import KINDS, Trace

# From bright to dark, so that they stay apart in grey; orange is for what happened once.
DECODED = "decoded at this step"
COLOURS = dict(zip((*KINDS, DECODED), ("#FFFFFF", "#E8E8E8", "#B5DDF5", "#56B4E9", "#0B3C6F", "#E8601C"), strict=True))
WIDTH, DPI = 10, 150
# Pixels of a decoded slot at least: the cells of a long canvas are smaller than one.
VISIBLE = 3.5
PROMPT, BLOCK = "end of the prompt", "start of a block"
LINES: dict[str, dict[str, Any]] = {
    PROMPT: {"color": "black", "lw": 1.2},
    BLOCK: {"color": "black", "lw": 0.8, "ls": (0, (4, 3))},
}
# More are not marked: the lines would cover the cells.
MOST_BLOCKS = 100


def check_installed() -> None:
    """Raise ValueError, with the remedy, if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install 'dkv[bench]'")


def figure(trace: Trace) -> Any:
    """The heat map as a matplotlib figure.

    Raises:
        ValueError: there is no matplotlib.
    """
    check_installed()
    from matplotlib.figure import Figure

    height = min(max(2.2 + 0.14 * trace.steps, 3.2), 8)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    inside = WIDTH * DPI * 0.93, (height - 1.6) * DPI
    _cells(axes, trace, inside)
    _decoded(axes, trace, inside)
    _boundaries(axes, trace)
    title = f"{trace.policy} computed {trace.computed_share:.0%} of the slots"
    axes.set_title(title, loc="left", fontsize=12, pad=38)
    small = (
        f"{trace.model}, {trace.prompt} + {trace.slots - trace.prompt} slots, steps: {trace.steps}, "
        f"passes: {trace.passes}, full: {trace.full.sum()}"
    )
    axes.annotate(small, (0, 1), (0, 24), "axes fraction", "offset points", fontsize=8.5, color="#555555")
    axes.set(xlabel="slot", ylabel="step", xlim=(-0.5, trace.slots - 0.5), ylim=(trace.steps + 0.5, 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _legend(figure, trace)
    return figure


def _cells(axes: Any, trace: Trace, inside: tuple[float, float]) -> None:
    """Every cell in its colour. Where cells are smaller than a pixel, they are averaged."""
    from matplotlib.colors import to_rgba

    colours = (255 * np.array([to_rgba(COLOURS[kind]) for kind in KINDS])).round().astype(np.uint8)[trace.kinds]
    how = {"interpolation": "nearest"}
    if trace.slots > inside[0] or trace.steps > inside[1]:
        how = {"interpolation": "antialiased", "interpolation_stage": "rgba"}
        # In the direction in which they are larger, averaging would blur their edges.
        for axis, pixels in enumerate(reversed(inside)):
            colours = colours.repeat(int(np.ceil(pixels / colours.shape[axis])), axis)
    axes.imshow(colours, aspect="auto", extent=(-0.5, trace.slots - 0.5, trace.steps + 0.5, 0.5), **how)


def _decoded(axes: Any, trace: Trace, inside: tuple[float, float]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    wide, high = max(1, VISIBLE * trace.slots / inside[0]), max(1, VISIBLE * trace.steps / inside[1])
    cells = [
        Rectangle((slot - wide / 2, trace.decoded[slot] + 1 - high / 2), wide, high)
        for slot in range(trace.prompt, trace.slots)
    ]
    # Above the lines, which are wider than the slots of a long canvas.
    axes.add_collection(PatchCollection(cells, color=COLOURS[DECODED], lw=0, zorder=3))


def _boundaries(axes: Any, trace: Trace) -> None:
    """Lines where blocks begin, and where the prompt ends, which is named at the top."""
    lines = [(block, LINES[BLOCK]) for block in trace.blocks[1:] if len(trace.blocks) <= MOST_BLOCKS]
    if trace.prompt:
        lines.append((trace.prompt, LINES[PROMPT]))
    for slot, style in lines:
        axes.axvline(slot - 0.5, color="white", lw=2)
        axes.axvline(slot - 0.5, **style)
    share, sides = trace.prompt / trace.slots, {"answer": "left", "prompt": "right", "prompt | answer": "center"}
    text = "answer" if share < 0.06 else "prompt" if share > 0.94 else "prompt | answer"
    place = {"xytext": (0, 5), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(text, (trace.prompt - 0.5, 1), ha=sides[text], fontsize=9, **place)


def _legend(figure: Any, trace: Trace) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    here = {*np.array(KINDS)[np.unique(trace.kinds)], DECODED}
    handles: list[Any] = [
        Patch(facecolor=colour, edgecolor="#999999", lw=0.5, label=name)
        for name, colour in COLOURS.items()
        if name in here
    ]
    shown = {PROMPT: trace.prompt > 0, BLOCK: 1 < len(trace.blocks) <= MOST_BLOCKS}
    handles += [Line2D([], [], label=name, **LINES[name]) for name in LINES if shown[name]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
