"""Figures: which are drawn, and that they show every point under its name."""

import pytest

from dkv.bench import plots
from dkv.bench.plots import drawing, speed

Text = pytest.importorskip("matplotlib.text").Text

FACTS = {
    "model": "m",
    "dtype": "float32",
    "processor": "P",
    "threads": 2,
    "torch": "2.0",
    "date": "2026-01-02T03:04:05",
}
SPEEDS = {"plain": (1.0, 1.0), "decode 8": (2.0, 0.4), "greedy 4": (2.05, 0.39)}


def comparison(batches=(1,), exact=None, ways=("dkv", "eager")):
    def row(policy, way, batch):
        faster, share = SPEEDS[policy]
        sizes = {"batch": batch, "prompt": 8, "new": 4, "steps": 4, "full_slots": 12 * batch}
        speeds = {"speed": faster, "slowest": faster - 0.1, "fastest": faster + 0.2, "full_ms": 9.0, "exact": exact}
        cached = {"cached_ms": 5.0, "cached_slots": 12 * batch * share}
        if policy == "plain":
            cached = dict.fromkeys(cached)
        rates = {"tokens_per_second": 10.0 * batch * faster, "computed_share": share}
        return {"policy": policy, "way": way, **sizes, **speeds, **cached, **rates}

    rows = [row(policy, way, batch) for batch in batches for policy in SPEEDS for way in ways]
    return {"facts": FACTS, "comparison": {"rows": rows}}


def growth():
    rows = [
        {"policy": policy, "new": new, "prompt": 16, "ms_per_slot": new / 10, "seconds": 1.0}
        for policy in ("plain", "greedy, no refresh")
        for new in (64, 128, 256)
    ]
    fits = [
        {"policy": "plain", "exponent": 1.02, "low": 0.9, "high": 1.1},
        {"policy": "greedy, no refresh", "exponent": 0.1, "low": None, "high": None},
    ]
    return {"facts": FACTS, "growth": {"rows": rows, "fits": fits}}


def floor(linear=None):
    rows = [
        {
            "kind": kind,
            "batch": 1,
            "slots": 16,
            "active": active,
            "rows": 4,
            "step_ms": 3.0,
            "floor_ms": 2.5,
            "linear_floor_ms": linear,
            "ratio": ratio,
            "parts": {"MLP": 2.0, "attention": 1.0},
        }
        for kind, active, ratio in (("full", 16, 1.2), ("cached", 5, 1.3))
    ]
    return {"facts": FACTS, "floor": {"rows": rows}}


def served():
    def row(way, load, seconds):
        times = {f"{name}_{share}": seconds for name in ("first", "whole") for share in ("p50", "p99")}
        return {"policy": "decode 8", "way": way, "rows": 8, "load": load, **times}

    rows = [row(way, load, load or 9) for load in (None, 0.5, 0.8) for way in ("LLM", "static")]
    return {"facts": FACTS, "serve": {"rows": [*rows, row("dkv serve", 0.5, 1.0)]}}


def names(axes):
    """Texts beside points."""
    return sorted(text.get_text() for text in axes.texts if hasattr(text, "xy"))


def points(axes):
    """Coordinates of single points, (x, y, filled)."""
    return [
        (*line.get_xydata()[0].tolist(), line.get_markerfacecolor() != "white")
        for line in axes.lines
        if len(line.get_xdata()) == 1
    ]


def said(figure):
    return "\n".join([figure.axes[0].get_title("left"), *(text.get_text() for text in figure.axes[0].texts)])


def test_speed_has_a_point_per_row_a_name_per_policy_and_the_ideal_line():
    figure = speed.speed_against_share(comparison())
    (axes,) = figure.axes
    expected = [(share, faster, way) for faster, share in SPEEDS.values() for way in (True, False)]
    assert sorted(points(axes)) == sorted(expected)
    assert names(axes) == sorted(SPEEDS)
    x, y = axes.lines[0].get_data()
    assert (
        all(a * b == pytest.approx(1) for a, b in zip(x, y, strict=True))
        and axes.lines[0].get_label() == "ideal: 1 / share"
    )
    assert all(
        text in said(figure) for text in ("m, float32", "8 + 4 slots, 4 steps, batch 1", "P, threads: 2", "2026-01-02")
    )
    low, high = axes.get_ylim()
    assert low < 0.9 and high > 2.25


def test_speed_shows_the_smallest_batch_of_a_sweep():
    found = comparison(batches=(4, 2))
    for row in found["comparison"]["rows"]:
        row["speed"] *= row["batch"]
    figure = speed.speed_against_share(found)
    assert {y for _, y, _ in points(figure.axes[0])} == {2 * faster for faster, _ in SPEEDS.values()}
    assert "batch 2" in said(figure) and "batch 4" not in said(figure)


def test_steps_are_plain_full_and_the_others_cached():
    (axes,) = speed.step_against_slots(comparison()).axes
    expected = [(12, 9.0), (12 * 0.4, 5.0), (12 * 0.39, 5.0)]
    assert sorted(points(axes)) == sorted((*point, way) for point in expected for way in (True, False))
    assert names(axes) == ["decode 8", "greedy 4", "plain (full)"]


def test_batch_has_a_line_per_policy_and_way():
    figure = speed.rate_against_batch(comparison(batches=(4, 1)))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["decode 8"] == lines["decode 8, eager baseline"] == [[1, 20], [4, 80]]
    assert len(lines) == 6


def test_accuracy_needs_exact_answers():
    assert speed.accuracy_against_speed(comparison()) is None
    found = comparison(exact=0.5, ways=("dkv",))
    (axes,) = speed.accuracy_against_speed(found).axes
    assert sorted(points(axes)) == sorted((faster, 0.5, True) for faster, _ in SPEEDS.values())
    assert names(axes) == sorted(SPEEDS)


def test_growth_names_the_exponents():
    (axes,) = speed.growth(growth()).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "plain: exponent 1.02 (0.90 to 1.10)",
        "greedy, no refresh: exponent 0.10",
    ]
    assert axes.lines[0].get_xydata().tolist() == [[80, 6.4], [144, 12.8], [272, 25.6]]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_floor_stacks_the_parts():
    figure = speed.floor(floor())
    (axes,) = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 2), (0, 2), (2, 1), (2, 1)]
    assert [set(line.get_xdata()) for line in axes.lines] == [{2.5}, {2.5}]
    assert names(axes) == ["1.20x floor", "1.30x floor"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full\n16 of 16 slots", "cached\n5 of 16 slots"]
    known = {"MLP", "attention", "floor: the products alone"}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == known
    linear = speed.floor(floor(linear=2.75))
    assert {text.get_text() for text in linear.legends[0].get_texts()} == known | {"the same by nn.Linear, not packed"}
    assert [line.get_xdata()[0] for line in linear.axes[0].lines] == [2.5, 2.75] * 2


def test_latency_has_lines_of_the_ways_that_were_asked_at_several_loads():
    figure = speed.latency(served())
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["LLM, 8 rows", "static, 8 rows"]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0.5, 0.5], [0.8, 0.8]]] * 8
    assert [line.get_markerfacecolor() == "white" for line in axes.lines] == [False, True] * 4


@pytest.mark.parametrize(
    ("found", "drawn"),
    [
        (comparison(batches=(1, 2)), ["speed", "steps", "batch"]),
        (comparison(exact=1.0), ["speed", "steps", "accuracy"]),
        (growth(), ["growth"]),
        (floor(), ["floor"]),
        (served(), ["latency"]),
        ({"facts": FACTS}, []),
    ],
    ids=["sweep", "answers", "growth", "floor", "requests", "nothing"],
)
def test_draws_what_there_is_data_for(tmp_path, monkeypatch, found, drawn):
    if drawn != ["floor"]:  # rendering takes a second
        monkeypatch.setattr(plots, "save", lambda figure, path: None)
    written = plots.draw(found, tmp_path / "new", "x_")
    assert written == [tmp_path / "new" / f"x_{name}.png" for name in drawn]
    if drawn == ["floor"]:
        assert written[0].read_bytes().startswith(b"\x89PNG")


def test_labels_do_not_cover_each_other_or_the_points():
    figure = speed.speed_against_share(comparison(ways=("dkv",)))
    (axes,) = figure.axes
    figure.draw_without_rendering()
    # Without the line to its point, which an annotation counts in.
    boxes = [Text.get_window_extent(text) for text in axes.texts if hasattr(text, "xy")]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*axes.transData.transform((x, y))) for x, y, _ in points(axes))


def test_ticks_are_round_and_enough():
    assert drawing.ticks(3, 60) == [5, 10, 20, 50]
    assert drawing.ticks(0.9, 2.5) == [1, 1.5, 2]
    assert drawing.ticks(0.1, 1.1) == [0.1, 0.2, 0.5, 1]


def test_missing_matplotlib_tells_the_remedy(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--plots needs matplotlib: pip install 'dkv\[bench\]'$"):
        plots.check_installed("--plots")
