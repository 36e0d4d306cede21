"""`dkv demo` on a random model: the drafts, the table, and what is counted."""

import json
from dataclasses import replace

import pytest

import dkv
from dkv.bench.accuracy import demo
from dkv.bench.problems import Exam, bundled
from dkv.models.bundled.tasks import ALL_TASKS, held_out


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Three policies, few slots, one timed round."""
    monkeypatch.setattr(demo, "SHOWN", ("plain", "decode 8", "plain half"))
    monkeypatch.setitem(ALL_TASKS, "balance", replace(ALL_TASKS["balance"], new_tokens=16))
    monkeypatch.setattr(demo, "ROUNDS", 1)


def test_demo(run):
    code, out, err = run("demo", "--problems", 2)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == held_out(1)[0][0] and lines[2] == "DecodeCache(refresh=8), 16 steps:"
    drafts = [line for line in lines if line.startswith("step ")]
    assert len(drafts) == 9 and drafts[0].count("░") > drafts[4].count("░") > drafts[-1].count("░") == 0
    (start,) = (i for i, line in enumerate(lines) if line.startswith("policy"))
    plain, decode, half = (line.split() for line in lines[start + 1 : start + 4])
    assert (plain[0], decode[:2], half[:2]) == ("plain", ["decode", "8"], ["plain", "half"])
    assert (plain[2:4], plain[5], half[4]) == (["1.00x", "100%"], "100.0%", "50%") and plain[4].endswith("/2")


def test_demo_json(run, folder):
    found = json.loads(run("demo", "--problems", 1, "--threads", 1, "--json")[1])
    assert (found["model"], found["problems"], found["threads"]) == (str(folder), 1, 1)
    plain, decode, half = found["results"]
    assert (plain["speed"], plain["computed_share"], plain["same_tokens"]) == (1, 1, 1)
    assert 0 < decode["computed_share"] < half["computed_share"] == 0.5


def test_demo_counts_exact_answers(folder):
    model, tokenizer = dkv.load(folder), dkv.load_tokenizer(str(folder))
    (problems,) = bundled(["balance"], 3)
    _, texts = Exam(model, tokenizer, problems).decode(0, 3, seed=0)
    texts[1] += "1"
    assert demo.measure(Exam(model, tokenizer, replace(problems, answers=texts)))[0]["exact"] == 2


def test_demo_draws_in_a_terminal(run, monkeypatch):
    monkeypatch.setattr(demo, "draws_drafts", lambda: True)
    out = run("demo", "--problems", 1)[1]
    assert out.count("\x1b[J") == 16 and "step 1" not in out


@pytest.mark.parametrize("name", ["problems", "threads"])
def test_demo_refuses_nothing(run, name):
    assert run("demo", f"--{name}", 0) == (2, "", f"dkv demo: error: --{name} must be at least 1, got 0\n")
    code, told, error = run("demo", f"--{name}", 10**11)
    assert (code, told) == (2, "") and f"--{name} must be at most" in error


def test_demo_of_another_task(run, monkeypatch):
    monkeypatch.setitem(ALL_TASKS, "addition", replace(ALL_TASKS["addition"], new_tokens=4))
    code, out, err = run("demo", "--problems", 1, "--task", "addition")
    (prompt, _) = held_out(1, task="addition")[0]
    assert (code, err) == (0, "") and out.startswith(f"{prompt}\n\nDecodeCache(refresh=8), 4 steps:")
