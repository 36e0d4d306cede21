"""`dkv eval`: what is counted, how it is compared, and that a stopped run goes on."""

import json

import pytest

import dkv
from dkv.bench import plots, problems
from dkv.bench.accuracy import frontier, quality
from dkv.bench.accuracy.intervals import enough, paired, wilson
from dkv.bench.contenders import contenders


@pytest.fixture(scope="module")
def tiny():
    return dkv.load("tiny", device="cpu"), dkv.load_tokenizer("tiny")


@pytest.fixture
def setting(tiny):
    sums = problems.Problems("sum", ["1+1=", "2+2=", "+1 ="], ["right", "wrong", "right"], 4)
    return quality.Setting(*tiny, [sums], batch=2, seed=0)


RUNS = contenders(["cache=decode refresh=2", "steps=half"])


def stopped_after(setting, monkeypatch, calls):
    """Let `Setting.run` stop like an interrupt after so many calls; the labels and places of those made."""
    original, made = quality.Setting.run, []

    def run(self, contender, family, start):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append((contender.label, start))
        return original(self, contender, family, start)

    monkeypatch.setattr(quality.Setting, "run", run)
    return made


def test_contenders_take_turns_on_every_batch(setting, monkeypatch):
    made = stopped_after(setting, monkeypatch, None)
    rows = quality.measure(setting, RUNS, quality.Log(None, {}))
    labels = ["plain", "decode 2", "plain half"]
    assert made == [("plain", 0), *((label, start) for start in (0, 2) for label in labels)]
    assert [row["label"] for row in rows] == labels
    assert all(row["problems"] == 3 and row["speed"] > 0 for row in rows)
    assert rows[0]["speed"] == rows[0]["computed_share"] == 1
    assert rows[2]["computed_share"] == 0.5 and rows[2]["passes"] == 4
    assert rows[1]["settings"]["cache"] == {"name": "decode", **vars(dkv.DecodeCache(2))}


def test_answers_are_compared_as_whole_texts(tiny):
    prompts = ["+1 -1 +2 ="] * 2
    model, tokenizer = tiny
    from dkv.tools.text import answer, encode

    ids, mask = encode(tokenizer, prompts[:1])
    found = dkv.generate(model, ids, mask, max_new_tokens=4, seed=0).sequences[0, ids.shape[1] :].tolist()
    text = answer(tokenizer, model.spec, found)
    own = problems.Problems("x", prompts, [f" {text.strip()} ", text + "1"], 4)
    (row,) = quality.measure(quality.Setting(model, tokenizer, [own], 2, 0), RUNS[:1], quality.Log(None, {}))
    assert (row["right"], row["exact"], row["tasks"]) == (1, 0.5, {"x": 0.5})


def test_a_stopped_run_goes_on_where_it_was(setting, monkeypatch, tmp_path):
    stopped_after(setting, monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        quality.measure(setting, RUNS, quality.Log(tmp_path, {"seed": 0}))
    monkeypatch.undo()
    # The one that was being written is half there.
    with (tmp_path / quality.LOG).open("a") as file:
        file.write('{"label": "pla')
    made = stopped_after(setting, monkeypatch, None)
    rows = quality.measure(setting, RUNS, quality.Log(tmp_path, {"seed": 0}))
    assert made == [("plain", 2), ("plain", 2), ("decode 2", 2), ("plain half", 2)]
    lines = (tmp_path / quality.LOG).read_text().splitlines()
    assert len(lines) == 1 + 6 and json.loads(lines[-1])["label"] == "plain half"
    assert [row["problems"] for row in rows] == [3, 3, 3]
    made.clear()
    assert quality.measure(setting, RUNS, quality.Log(tmp_path, {"seed": 0})) == rows
    assert made == []


def test_what_is_added_later_is_timed_against_plain_anew(setting, monkeypatch, tmp_path):
    first = quality.measure(setting, RUNS[:1], quality.Log(tmp_path, {}))
    made = stopped_after(setting, monkeypatch, None)
    log = quality.Log(tmp_path, {})
    rows = quality.measure(setting, RUNS[:2], log)
    assert made == [("plain", 0)] + [(label, start) for start in (0, 2) for label in ("plain", "decode 2")]
    assert rows[0]["right"] == first[0]["right"]
    own = [log.runs["decode 2", "sum", start] for start in (0, 2)]
    plain = [log.plain_seconds["sum", start, own[0]["session"]] for start in (0, 2)]
    assert rows[1]["speed"] == pytest.approx(sum(plain) / sum(run["seconds"] for run in own))


def test_a_folder_of_another_setting_is_refused(tmp_path):
    quality.Log(tmp_path, {"seed": 0, "batch": 8})
    with pytest.raises(ValueError, match=r"runs with batch 8, not 16: give another --out"):
        quality.Log(tmp_path, {"seed": 0, "batch": 16})
    for text in ("not json\n", "", '{"setting": {"seed": 0}}\n{"label": 1}\n', "[]\n"):
        (tmp_path / quality.LOG).write_text(text)
        with pytest.raises(ValueError, match="is not a log of dkv eval"):
            quality.Log(tmp_path, {"seed": 0})


def test_the_seed_draws_the_problems():
    first, second = (problems.bundled(["balance", "cells"], 4, seed=seed) for seed in (1, 2))
    assert [p.name for p in first] == ["balance", "cells"] and first == problems.bundled(
        ["balance", "cells"], 4, seed=1
    )
    assert not set(first[0].prompts) & set(second[0].prompts)
    assert problems.fingerprint(first) != problems.fingerprint(second)


def test_the_digest_tells_weights_apart(tiny):
    assert quality.digest(tiny[0]) == quality.digest(dkv.load("tiny", device="cpu"))
    other = dkv.load("tiny", device="cpu")
    other.norm.weight.data[0] += 1
    assert quality.digest(other) != quality.digest(tiny[0])


def test_problems_of_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "1", "answer": "2"},
        {"prompt": "3", "answer": "4", "task": "b"},
        {"prompt": "5", "answer": "6"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert problems.from_file(path, 8) == [
        problems.Problems("mine", ("1", "5"), ("2", "6"), 8),
        problems.Problems("b", ("3",), ("4",), 8),
    ]
    assert problems.from_file(path, 8, 1)[0].prompts == ("1",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problems"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt"', "line 2 is not JSON"),
        ('{"prompt": "a"}', 'line 1 must be an object with texts "prompt" and "answer"'),
        ('["a", "b"]', "line 1 must be an object"),
        ('{"prompt": "a", "answer": 3}', "line 1 must be an object"),
        ('{"prompt": "", "answer": "3"}', "line 1 must be an object"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        problems.from_file(path, 8)


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
    # Nor can a single problem, or none that plain decoding answers, say anything.
    none = [row(name, 0.0, 100, 1.0, 0, policy) for name, policy in (("plain", "none"), ("decode 8", "decode"))]
    assert frontier.verdict(none) == "Plain decoding answers none of the 500 problems: nothing can be lost on them."


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
    }
    figure = plots.answers({"rows": ROWS, "facts": facts})
    for axes in figure.axes:
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert len(points) == len(ROWS)
