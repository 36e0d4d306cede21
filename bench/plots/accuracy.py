"""Figures of `dkv eval`: answers and texts against speed, and the change of keys and values between steps."""

from typing import Any

from dkv.bench.accuracy.frontier import frontier
from dkv.bench.plots import drawing

Row = dict[str, Any]
# Up to so many points have their names beside them; of more, those on the frontier.
NAMED = 20
# By what the panels compare: how far its axis goes below and above the values, its form and name.
PANELS = {
    "tokens_per_second": (1.2, 1.6, "{:g}", "new slots per second"),
    "computed_share": (1.6, 1.1, "{:.0%}", "slots computed, as a share of plain decoding (fewer to the right)"),
}


# By what is compared: the ends of its interval and its form and name.
MEASURES = {
    "exact": ("low", "high", lambda value, _: f"{100 * value:.3g}%", "answered exactly"),
    "nats": (None, None, lambda value, _: f"{value:.2f}", "nats a token of what is written (less: likelier)"),
}


def answers(found: Row) -> Any:
    """Over what was measured, exact answers or likelihood: tokens per second, and the computed share."""
    from matplotlib.figure import Figure

    rows, facts = found["rows"], found["facts"]
    measures = [name for name in MEASURES if rows[0].get(name) is not None]
    figure = Figure(figsize=(13, 1 + 5 * len(measures)), layout="constrained")
    problems = f"{', '.join(f'{count} {name}' for name, count in facts['problems'].items())}, batch {facts['batch']}"
    small = drawing.measured_on(facts, problems).replace("\n", "; ")
    figure.suptitle(f"What is written against speed and work\n{small}", fontsize=10, x=0.01, ha="left")
    styles = drawing.styles([row["policy"] for row in rows])
    grid = figure.subplots(len(measures), 2, sharey="row", squeeze=False)
    places = [(by, of, grid[i][j]) for i, of in enumerate(measures) for j, by in enumerate(PANELS)]
    for by, of, axes in places:
        below, above, form, name = PANELS[by]
        values = [row[by] for row in rows]
        _panel(axes, rows, by, of, styles)
        # Room for names to the right of the points.
        drawing.logarithmic(axes, "x", min(values) / below, max(values) * above, form)
        axes.set_xlabel(name)
    for of, (left, right) in zip(measures, grid, strict=True):
        right.invert_xaxis()
        left.set_ylabel(MEASURES[of][3])
        left.yaxis.set_major_formatter(MEASURES[of][2])
        if of == "nats":
            left.invert_yaxis()
    figure.draw_without_rendering()
    for by, of, axes in places:
        named = rows if len(rows) <= NAMED else frontier(rows, by, of)
        drawing.label(axes, [(r[by], r[of], r["label"], styles[r["policy"]]["color"]) for r in named], least=4)
    figure.legend(handles=_legend(styles, rows), loc="outside lower center", ncols=len(styles) + 3, frameon=False)
    return figure


def _fewer(row: Row) -> bool:
    return row["settings"]["steps"] is not None


def _random(row: Row) -> bool:
    return row["settings"].get("confidence") == "random"


def _panel(axes: Any, rows: list[Row], by: str, of: str, styles: dict[str, dict[str, str]]) -> None:
    drawing.plain(axes)
    best = sorted(frontier(rows, by, of), key=lambda row: row[by])
    axes.plot([row[by] for row in best], [row[of] for row in best], color="#bbbbbb", lw=3, zorder=1)
    low, high, *_ = MEASURES[of]
    for row in rows:
        style = styles[row["policy"]] | ({"marker": "x"} if _random(row) else {})
        if low is not None:
            axes.plot([row[by]] * 2, [row[low], row[high]], color=style["color"], lw=0.8, alpha=0.6)
        face = "white" if _fewer(row) else style["color"]
        axes.plot(row[by], row[of], mfc=face, ms=7, zorder=2, **style)


def _legend(styles: dict[str, dict[str, str]], rows: list[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    words, grey = {"none": "no cache"}, {"ls": "", "color": "#555555"}
    handles = [Line2D([], [], ls="", label=words.get(name, name), **style) for name, style in styles.items()]
    if any(map(_fewer, rows)):
        handles.append(Line2D([], [], marker="o", mfc="white", label="fewer steps", **grey))
    if any(map(_random, rows)):
        handles.append(Line2D([], [], marker="x", label="random order", **grey))
    return [*handles, Line2D([], [], color="#bbbbbb", lw=3, label="frontier")]


def drift(found: dict[str, Any]) -> Any:
    """Change by step from the decoding above, and what each delay leaves stale below; keys left, values right."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    facts = found["facts"]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    what = f"{facts['model']}, {found['slots']} decoded slots; torch {facts['torch']}, {facts['date'][:10]}"
    title = f"Change of keys and values around the step that decodes a slot\n{what}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for column, kind in enumerate(("keys", "values")):
        above, below = (figure.add_subplot(2, 2, place) for place in (1 + column, 3 + column))
        layers = found["change"][kind]
        for i, layer in enumerate(layers):
            colour = colormaps["viridis"](i / max(len(layers) - 1, 1) * 0.9)
            above.plot(found["offsets"], layer, color=colour, marker="o", ms=3, label=f"layer {i}")
        above.axvspan(-0.5, 0.5, color="#f0e0c0", zorder=0)
        above.set(title=f"{kind}: change from the pass before", xlabel="passes since its token is seen", yscale="log")
        if len(layers) <= 8:
            above.legend(fontsize=8, frameon=False)
        for i, (name, kept) in enumerate(found["stale"][kind].items()):
            places = [layer + 0.27 * (i - 1) for layer in range(len(kept))]
            below.bar(places, kept, 0.25, label=f"cached {name}", color=("#D55E00", "#0072B2", "#56B4E9")[i])
        below.plot(found["int8"][kind], "D", color="#333333", ms=4, label="kept in 8 bits")
        below.set(title=f"{kind}: distance to the last pass", xlabel="layer")
        below.xaxis.get_major_locator().set_params(integer=True)
        below.legend(fontsize=8, frameon=False)
        for axes in (above, below):
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if value < 0.01 else f"{value:.0%}")
            drawing.plain(axes)
            axes.grid(visible=False, axis="x")
    return figure
