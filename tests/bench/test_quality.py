"""`dkv eval`: what is counted, how it is compared, and that a stopped run goes on."""

import json

import pytest

import dkv
from dkv.bench import problems
from dkv.bench.accuracy import frontier, quality
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
    with pytest.raises(KeyboardInterrupt), quality.Log(tmp_path, {"seed": 0}) as log:
        quality.measure(setting, RUNS, log)
    monkeypatch.undo()
    # The one that was being written is half there.
    with (tmp_path / quality.LOG).open("a") as file:
        file.write('{"label": "pla')
    made = stopped_after(setting, monkeypatch, None)
    with quality.Log(tmp_path, {"seed": 0}) as log:
        rows = quality.measure(setting, RUNS, log)
    assert made == [("plain", 2), ("plain", 2), ("decode 2", 2), ("plain half", 2)]
    lines = (tmp_path / quality.LOG).read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[-1])["label"] == "plain half"
    assert [row["problems"] for row in rows] == [3, 3, 3]
    made.clear()
    with quality.Log(tmp_path, {"seed": 0}) as log:
        assert quality.measure(setting, RUNS, log) == rows
    assert made == []


def test_what_is_added_later_is_timed_against_plain_anew(setting, monkeypatch, tmp_path):
    with quality.Log(tmp_path, {"seed": 0}) as log:
        first = quality.measure(setting, RUNS[:1], log)
    made = stopped_after(setting, monkeypatch, None)
    with quality.Log(tmp_path, {"seed": 0}) as log:
        rows = quality.measure(setting, RUNS[:2], log)
    assert made == [("plain", 0)] + [(label, start) for start in (0, 2) for label in ("plain", "decode 2")]
    assert rows[0]["right"] == first[0]["right"]
    own = [log.runs["decode 2", "sum", start] for start in (0, 2)]
    plain = [log.plain_seconds["sum", start, own[0]["session"]] for start in (0, 2)]
    assert rows[1]["speed"] == pytest.approx(sum(plain) / sum(run["seconds"] for run in own))


def test_a_log_of_something_else_is_refused(tmp_path):
    with quality.Log(tmp_path, {"seed": 0}):
        pass
    (tmp_path / quality.LOG).write_text('{"label": 1}\n')
    with pytest.raises(ValueError, match="its line 1 is none of its records: give another --out"):
        quality.Log(tmp_path, {"seed": 0})


def test_the_seed_draws_the_problems():
    first, second = (problems.bundled(["balance", "cells"], 4, seed=seed) for seed in (1, 2))
    assert [p.name for p in first] == ["balance", "cells"] and first == problems.bundled(
        ["balance", "cells"], 4, seed=1
    )
    assert not set(first[0].prompts) & set(second[0].prompts)
    assert problems.fingerprint(first) != problems.fingerprint(second)


def test_passages_are_fewer_than_problems():
    """They are long: as many would take hours on a CPU."""
    assert [len(family.prompts) for family in problems.bundled(["balance", "stories", "words"])] == [96, 8, 8]
    assert [len(family.prompts) for family in problems.bundled(["balance", "stories"], 3)] == [3, 3]


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


def test_prompts_without_answers_are_openings(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": "3", "answer": "4", "task": "b"}\n{"prompt": "5"}\n')
    known = [problems.Openings("mine", ("1", "5"), 8), problems.Problems("b", ("3",), ("4",), 8)]
    assert problems.from_file(path, 8) == known
    assert problems.fingerprint(known) != problems.fingerprint(known[:1])


def test_what_is_gone_on_with_is_judged_by_its_likelihood(tiny):
    texts = [problems.Openings("text", ["+1 -1 +2 =", "1+1=", "+3 -3="], 8)]
    setting = quality.Setting(*tiny, texts, batch=2, seed=0)
    plain, decode, half = quality.measure(setting, RUNS, quality.Log(None, {}))
    assert (plain["problems"], plain["texts"], plain["nats_change"]) == (0, 3, 0)
    assert plain["nats"] > 0 and 0 <= plain["repeated"] <= 1
    assert half["nats"] - plain["nats"] == pytest.approx(half["nats_change"])
    assert half["nats_low"] <= half["nats_change"] <= half["nats_high"]
    head = frontier.table([plain, decode, half]).splitlines()[0]
    assert "nats a token" in head and "repeated" in head and "exact" not in head
    assert frontier.verdict([plain, plain | {"label": "a", "speed": 3.0}]).startswith(
        "Fastest with texts within 0.05 nats a token of those of plain decoding: a, 3.00x plain, +0.000 (+0.000"
    )
    assert frontier.verdict([plain, half | {"nats_change": 1.0}]).startswith("None has texts within 0.05 nats")


def test_likelihood_is_that_of_the_tokens_that_were_written(tiny):
    from dkv.tools.likelihood import log_likelihoods
    from dkv.tools.text import encode

    model, tokenizer = tiny
    family = problems.Openings("text", ["+1 -1 +2 =", "1+1="], 6)
    exam = problems.Exam(model, tokenizer, family)
    output, found = family.marked(exam, 0, 2, seed=0)
    rows = [encode(tokenizer, [prompt])[0][0].tolist() for prompt in family.prompts]
    written = output.sequences[:, -6:].tolist()
    wanted = dict(log_likelihoods(model, list(zip(rows, written, strict=True)), samples=problems.COPIES))
    assert found["nats"] == pytest.approx([-wanted[0] / 6, -wanted[1] / 6], rel=1e-4)


def test_repetition_is_counted_by_runs():
    assert problems.repeated(list(range(40))) == 0 and problems.repeated([1, 2]) == 0
    assert problems.repeated([7] * 40) == 28 / 29
    assert problems.repeated([*range(20), *range(20)]) == 9 / 29


def test_holes_are_filled_and_counted_one_by_one(tiny):
    model, tokenizer = tiny
    (whole,) = problems.bundled(["addition"], 3, seed=5)
    texts = [prompt + answer for prompt, answer in zip(whole.prompts, whole.answers, strict=True)]
    holes = [[(83, 85), (100, 104)], [(90, 92)], [(84, 86), (95, 99), (110, 111)]]
    family = problems.Gapped("holes", texts, holes, 7)
    (row,) = quality.measure(quality.Setting(model, tokenizer, [family], 2, 0), RUNS[:1], quality.Log(None, {}))
    # A digit of a sum whose two numbers and neighbours are known is no question.
    assert (row["problems"], row["right"]) == (6, 6)
    family = problems.Gapped("holes", texts[:1], [[(84, 86), (100, 104)]], 6)
    _, found = family.marked(problems.Exam(model, tokenizer, family), 0, 1, seed=0, cache=dkv.DecodeCache(2))
    assert found["right"] == [True, True]
    assert problems.Gapped("holes", ["1+1="], [[]], 0).marked(problems.Exam(model, tokenizer, family), 0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problems"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt"', "line 2 is not JSON"),
        ('{"answer": "a"}', 'line 1 must be an object with texts "prompt" and "answer"'),
        ('{"prompt": "a"}\n{"prompt": "b", "answer": "c"}', "line 2: a task has an answer to every prompt, or to none"),
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
