"""Tables, sentences and files of results."""

import csv
import json

from dkv.bench import report
from dkv.bench.speed import compare


def row(policy, speed, *, way="dkv", spread=0.0, exact=None, over_eager=None, rounds=3):
    return {
        "seconds": [1.0] * rounds,
        "policy": policy,
        "way": way,
        "batch": 2,
        "prompt": 8,
        "new": 4,
        "speed": speed,
        "slowest": speed - spread,
        "fastest": speed + spread,
        "exact": exact,
        "over_eager": over_eager,
    }


def test_columns_align():
    text = report.columns(("name", "ms"), [("a", "1.5"), ("longer", "10.25")])
    assert text == "name       ms\na         1.5\nlonger  10.25"


def test_verdict_sorts_the_policies():
    rows = [
        row("plain", 1.0, over_eager=2.5),
        row("a", 2.0, spread=0.5),
        row("b", 0.8, spread=0.1),
        row("c", 1.1, spread=0.2),
    ]
    assert compare.verdict(rows).splitlines() == [
        "Fastest for 8 + 4 slots at batch 2: a, 2.00x plain.",
        "The cache pays for a; it does not pay for b; it makes no clear difference for c.",
        "Against the eager baseline of the same policy: plain 2.50x.",
    ]


def test_verdict_does_not_call_a_tie_a_gain():
    assert "makes no clear difference for a" in compare.verdict([row("plain", 1.0), row("a", 1.01)])


def test_verdict_of_one_round_does_not_say_what_pays():
    said = compare.verdict([row("plain", 1.0, rounds=1), row("a", 2.0, rounds=1)])
    assert "One round cannot tell whether the cache pays: give --rounds 3." in said and "pays for a" not in said


def test_verdict_without_a_right_answer_names_no_policy_as_exact():
    said = compare.verdict([row("plain", 1.0, exact=0.0), row("a", 2.0, exact=0.0)])
    assert "Plain answers none of the problems exactly" in said and "as many" not in said


def test_verdict_ignores_the_baseline_and_names_the_fastest_that_is_as_exact():
    rows = [
        row("plain", 1.0, exact=0.75),
        row("plain", 9.0, way="eager"),
        row("a", 3.0, exact=0.5),
        row("b", 1.5, exact=0.75),
        row("c", 2.0, exact=0.75),
    ]
    said = compare.verdict(rows)
    assert "Fastest for 8 + 4 slots at batch 2: a, 3.00x plain." in said
    assert "Plain answers 75% exactly; the fastest that answers as many: c." in said
    assert "as many: none." in compare.verdict(rows[:3])


def test_refusals_for_one_reason_share_a_line():
    refused = {"prefill": "no, got a", "pd 8": "no, got b", "other": "never"}
    said = "No eager baseline for prefill, pd 8: no\nNo eager baseline for other: never"
    assert compare.refusals(refused) == said


def test_verdict_of_plain_alone_says_nothing():
    assert compare.verdict([row("plain", 1.0)]) == ""


def test_machine_line_names_model_machine_and_versions():
    facts = {
        "model": "m",
        "parameters": 1_500_000,
        "dtype": "float32",
        "processor": "P",
        "threads": 1,
        "cores": 2,
        "torch": "2.0",
        "dkv": "0.1",
        "date": "2026-01-02T03:04:05+00:00",
    }
    line = "m (1.5 M parameters, float32) on {}; torch 2.0, dkv 0.1, 2026-01-02"
    assert report.machine_line(facts) == line.format("P, threads: 1 of 2 cores")
    assert report.machine_line({**facts, "card": "G"}) == line.format("G")


def test_a_table_that_is_printed_as_it_comes_has_fixed_widths():
    columns = {"name": (6, "{name}"), "ms": (5, "{ms:.1f}"), "": (3, lambda row: row["note"])}
    assert report.fixed(columns) == "name       ms"
    assert report.fixed(columns, {"name": "a", "ms": 2, "note": "x"}) == "a         2.0    x"


def test_empty_columns_are_left_out():
    cells = {
        "a": lambda row: row["a"],
        "b": "{b:.1f}x",
        "c": "{c}",
        "d": "{d} of {b}",
    }
    rows = [{"a": "x", "b": None, "c": None}, {"a": "y", "b": 2.0, "c": None}]
    assert report.table(rows, cells) == "a     b\nx\ny  2.0x"


def test_csv_has_a_line_per_row(tmp_path):
    path = tmp_path / "a.csv"
    report.save_csv(
        path, [{"policy": "plain, all", "seconds": [1.5, 2.0], "exact": None}, {"policy": "b", "seconds": [3]}]
    )
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["policy"] for r in rows] == ["plain, all", "b"]
    assert json.loads(rows[0]["seconds"]) == [1.5, 2.0] and rows[0]["exact"] == rows[1]["exact"] == ""
    assert list(tmp_path.iterdir()) == [path]
