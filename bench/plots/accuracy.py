"""Figures of `dkv eval`: exact answers against speed, and the change of keys and values between steps."""

from collections.abc import Sequence
from typing import Any

from dkv.bench.accuracy.frontier import frontier
from dkv.bench.plots import drawing
from dkv.bench.plots.drawing import COLOURS, MARKERS

Row = dict[str, Any]
# Up to so many points have their names beside them; of more, those on the frontier.
NAMED = 20
WORDS = {"none": "no cache"}


def answers(found: Row) -> Any:
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
        Line2D(
            [],
            [],
            ls="",
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            label=WORDS.get(name, name),
        )
        for i, name in enumerate(policies)
    ]
    grey = {"ls": "", "color": "#555555"}
    if any(row["settings"]["steps"] is not None for row in rows):
        handles.append(Line2D([], [], marker="o", mfc="white", label="fewer steps", **grey))
    if any(row["settings"].get("confidence") == "random" for row in rows):
        handles.append(Line2D([], [], marker="x", label="random order", **grey))
    handles.append(Line2D([], [], color="#bbbbbb", lw=3, label="frontier"))
    return handles


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
        below.set(title=f"{kind}: distance to the last pass", xlabel="layer")
        below.xaxis.get_major_locator().set_params(integer=True)
        below.legend(fontsize=8, frameon=False)
        for axes in (above, below):
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if value < 0.01 else f"{value:.0%}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e6e6e6", lw=0.7, axis="y")
            axes.set_axisbelow(True)
    return figure
