"""What the figures of `dkv eval` say: intervals, the frontier, the verdict, the table and the figure."""

from itertools import pairwise

import pytest

from dkv.bench import plots
from dkv.bench.accuracy import frontier
from dkv.bench.accuracy.intervals import difference, enough, paired, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (8, 10, 0.4902, 0.9433), (475, 500, 0.9272, 0.9659)],
)
def test_wilson(right, count, low, high):
    """Against published values of Wilson's interval."""
    assert wilson(right, count) == pytest.approx((low, high), abs=2e-4)


def test_paired_differences():
    same = [True] * 450 + [False] * 50
    change, low, high = paired(same, same)
    assert change == 0 and low == -high and 0.3 < high < 0.5
    worse = [False] * 20 + same[20:]
    change, low, high = paired(worse, same)
    assert change == -4.0 and low < -5.5 and -3 < high < -2
    assert paired(same, worse)[0] == 4.0


def row(label, exact, rate, share, change, policy="decode", half=0.4, problems=500):
    return {
        "label": label,
        "policy": policy,
        "settings": {"steps": 0.5 if "half" in label else None},
        "exact": exact,
        "low": exact - 0.01,
        "high": min(exact + 0.01, 1),
        "change": change,
        "change_low": change - half,
        "change_high": change + half,
        "tokens_per_second": rate,
        "speed": rate / 100,
        "computed_share": share,
        "problems": problems,
        "right": round(problems * exact),
        "tasks": {"balance": exact, "cells": exact},
        "passes": 64,
    }


ROWS = [
    row("plain", 0.98, 100, 1.0, 0, "none"),
    row("plain half", 0.60, 190, 0.5, -38, "none"),
    row("decode 8", 0.976, 220, 0.36, -0.4),
    row("greedy 8", 0.955, 400, 0.2, -2.5, "greedy"),
    row("greedy 16", 0.5, 390, 0.1, -48, "greedy"),
]


def test_the_frontier_is_what_nothing_beats():
    assert [r["label"] for r in frontier.frontier(ROWS)] == ["greedy 8", "decode 8", "plain"]
    assert [r["label"] for r in frontier.frontier(ROWS, "computed_share")] == [
        "greedy 16",
        "greedy 8",
        "decode 8",
        "plain",
    ]


def test_the_verdict_says_what_is_lost_and_won():
    said = frontier.verdict(ROWS).splitlines()
    assert said[0].startswith("Fastest cache with at most 0.5 points lost: decode 8, 2.20x plain, -0.4 points")
    assert said[1].startswith("Fastest cache with at most 3 points lost: greedy 8, 4.00x plain")
    assert said[2].startswith("Half the steps, no cache: plain half, 1.90x plain, -38.0 points")
    assert said[3].startswith("A cache is better: greedy 8, 4.00x")
    alone = frontier.verdict([*ROWS[:2], ROWS[4]])
    assert "No cache with at most 0.5 points lost." in alone and "No cache is at least as fast" in alone


def test_few_problems_are_told_and_not_judged():
    few = {"half": 14.0, "problems": 12}
    rows = [
        row("plain", 1.0, 100, 1.0, 0, "none", **few),
        row("plain half", 1.0, 190, 0.5, 0, "none", **few),
        row("decode 8", 1.0, 220, 0.36, 0, **few),
    ]
    said = frontier.verdict(rows).splitlines()
    assert said[0].startswith("Too few problems (12, +-14.0 points; about ") and "Fastest" not in "".join(said)
    assert said[0].endswith(" would do) to tell whether a cache has at most 0.5 points lost.")
    assert said[1].endswith("at most 3 points lost.") and said[3].endswith("to tell whether a cache is better.")
    # A loss that is large is seen all the same.
    rows[2] = row("decode 8", 0.3, 220, 0.36, -60, **few)
    assert frontier.verdict(rows).splitlines()[0] == "No cache with at most 0.5 points lost."


@pytest.mark.parametrize(("right", "count", "said"), [(0, 500, "none"), (2, 96, "2"), (5, 96, "5")])
def test_problems_that_are_too_hard_tell_nothing(right, count, said):
    """Not even which is the fastest."""
    ways = (("plain", "none", 100), ("decode 8", "decode", 900))
    rows = [row(name, right / count, rate, 1.0, 0, policy, problems=count) for name, policy, rate in ways]
    told = f"Plain decoding answers {said} of the {count} problems: accuracy cannot tell settings apart here."
    assert frontier.verdict(rows) == told
    # What is written may tell all the same.
    texts = {"texts": 9, "nats_change": 0.0, "nats_low": 0.0, "nats_high": 0.0}
    first, second = frontier.verdict([r | texts for r in rows]).splitlines()
    assert first == told and second.startswith("Fastest with texts within 0.05 nats a token")
    # As hard, but enough of them.
    many = [r | {"problems": 100 * count, "right": 100 * right} for r in rows]
    assert ("Fastest cache" in frontier.verdict(many)) is (right == 5)


@pytest.mark.parametrize(("lost", "count", "wanted"), [(0, 4, 3.0), (2, 50, 0.5), (0, 1, 0.5), (0, 768, 3.0)])
def test_enough_problems_are_as_many_as_the_interval_needs(lost, count, wanted):
    def half(lost, count):
        _, low, high = paired([False] * lost + [True] * (count - lost), [True] * count)
        return (high - low) / 2

    needed = enough(half(lost, count), count, wanted)
    found = half(round(lost * needed / count), needed)
    assert found <= 1.1 * wanted
    assert needed == count or half(round(0.8 * lost * needed / count), round(0.8 * needed)) > wanted


def test_the_table_has_a_line_per_contender_and_a_column_per_task():
    head, *lines = frontier.table(ROWS).splitlines()
    assert head.split()[-2:] == ["balance", "cells"] and len(lines) == 5
    assert lines[2].split()[:5] == ["decode", "8", "220", "2.20x", "36%"]
    for r in ROWS:
        r["tasks"].pop("cells")
    assert frontier.table(ROWS).splitlines()[0].split()[-1] == "won"


def test_the_figure_shows_every_contender():
    facts = {
        "model": "tiny",
        "dtype": "float32",
        "processor": "a",
        "threads": 1,
        "torch": "2",
        "date": "2026-01-01",
        "batch": 8,
        "problems": {"balance": 100},
    }
    rows = [row | {"nats": 1 + i / 10} for i, row in enumerate(ROWS)]
    for figure, panels in (
        (plots.answers({"rows": ROWS, "facts": facts}), 2),
        (plots.answers({"rows": rows, "facts": facts}), 4),
    ):
        assert len(figure.axes) == panels
        for axes in figure.axes:
            points = [line for line in axes.lines if len(line.get_xdata()) == 1]
            assert len(points) == len(ROWS)


def test_less_likely_texts_are_not_on_the_frontier():
    rows = [row | {"nats": nats} for row, nats in zip(ROWS, (2.0, 2.0, 1.0, 3.0, 1.5), strict=False)]
    by_speed = sorted(rows, key=lambda row: -row["tokens_per_second"])
    kept = frontier.frontier(rows, of="nats")
    assert kept[0] == by_speed[0] and all(a["nats"] > b["nats"] for a, b in pairwise(kept))
    assert min(row["nats"] for row in rows) == kept[-1]["nats"]


def test_of_texts_that_count_as_alike_the_fastest_stands_for_all():
    rows = [row | {"nats": nats} for row, nats in zip(ROWS, (1.0, 1.3, 0.99, 1.03, 1.5), strict=True)]
    assert [r["label"] for r in frontier.frontier(rows, of="nats")] == ["greedy 8"]
    assert [r["label"] for r in frontier.frontier(rows, "computed_share", "nats")] == ["greedy 16", "greedy 8"]
    rows[2]["nats"] = 0.97
    assert [r["label"] for r in frontier.frontier(rows, of="nats")] == ["greedy 8", "decode 8"]


def test_the_interval_of_a_mean_difference():
    assert difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == (1.0, 1.0, 1.0)
    middle, low, high = difference([1.0, 3.0], [0.0, 0.0])
    assert (middle, middle - low) == (2.0, pytest.approx(1.959964 * 2**0.5 / 2**0.5)) and high - 2 == pytest.approx(
        2 - low
    )
    assert difference([1.0], [0.0]) == (1.0, -float("inf"), float("inf"))
