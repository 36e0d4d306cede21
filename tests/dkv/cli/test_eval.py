"""`dkv eval`: its arguments, its files, and real runs of a small model."""

import json
import os
import shlex

import pytest

from dkv.bench.problems import TEXTS
from dkv.cli import build_parser
from dkv.cli import eval as command
from dkv.cli.measuring import TASK_NAMES, TASKS_OF
from dkv.models.bundled.recipes import RECIPES
from dkv.models.bundled.tasks import TASKS


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(3)))
    return path


def test_names_are_those_of_the_tasks():
    assert tuple(TASKS) == TASK_NAMES
    known = {name: tuple(recipe.tasks) for name, recipe in RECIPES.items() if name != "tiny-text"}
    assert {**known, "tiny-text": tuple(TEXTS)} == TASKS_OF


def test_the_examples_parse():
    for line in command.EXAMPLES.splitlines():
        if line.startswith("  dkv "):
            words = shlex.split(line.partition("      ")[0])
            assert build_parser().parse_args(words[1:]).run is command.run


def test_a_file_of_problems(run, folder, data, tmp_path):
    words = (
        "eval",
        "--model",
        folder,
        "--data",
        data,
        "--new-tokens",
        6,
        "--batch",
        2,
        "--threads",
        1,
        "--run",
        "cache=decode refresh=2 steps=all,half",
    )
    code, out, err = run(*words, "--out", tmp_path / "out", "--json", tmp_path / "a.json")
    assert code == 0
    # A line per batch, as there is no terminal.
    said = [line for line in err.splitlines() if "warning" not in line]
    assert said[0].startswith("dkv eval: 1 of 6 batches (mine, plain), ") and len(said) == 6
    lines = out.splitlines()
    assert lines[0].startswith(f"{folder} (0.0 M parameters, float32) on ")
    assert [line[:14].strip() for line in lines[3:6]] == ["plain", "decode 2", "decode 2 half"]
    assert lines[-2:] == [str(tmp_path / "out" / name) for name in ("eval.json", "eval.png")]
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == json.loads((tmp_path / "out" / "eval.json").read_text())
    assert found["facts"]["problems"] == {"mine": 3} and found["facts"]["command"].startswith("dkv eval --model ")
    assert [row["passes"] for row in found["rows"]] == [12, 12, 6]
    assert (tmp_path / "out" / "eval.png").stat().st_size > 10_000

    # The table is printed again from the file.
    assert run("eval", "--show", tmp_path / "a.json") == (0, "\n".join([*lines[:-3], ""]), "")

    # Repeated, nothing is run again, and with another seed nothing is mixed.
    log = (tmp_path / "out" / "runs.jsonl").read_text()
    again = run(*words, "--out", tmp_path / "out")
    assert again[0] == 0 and again[1].splitlines()[3:6] == lines[3:6]
    assert (tmp_path / "out" / "runs.jsonl").read_text() == log
    code, out, err = run(*words, "--out", tmp_path / "out", "--seed", 2)
    assert code == 2 and "was made with seed 1, not 2: give another --out, or remove the file" in err


def test_drift_of_a_file_of_problems(run, folder, data, tmp_path):
    code, out, err = run("eval", "--drift", "--model", folder, "--data", data, "--new-tokens", 12, "--out", tmp_path)
    assert code == 0 and " of " not in err
    assert out.splitlines()[2].split()[:2] == ["keys", "masked"]
    assert json.loads((tmp_path / "drift.json").read_text())["slots"] == 36
    assert (tmp_path / "drift.png").exists()
    assert run("eval", "--show", tmp_path / "drift.json") == (0, "\n".join([*out.splitlines()[:-3], ""]), "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--problems", 0), "--problems must be at least 1"),
        (("--problems", 10**12), "--problems must be at most 65536, got 1000000000000"),
        (("--threads", 10**8), "--threads must be at most 1024, got 100000000"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--new-tokens", 4), "--new-tokens goes with --data"),
        (("--chat",), "--chat goes with --data"),
        (("--data", "missing.jsonl", "--new-tokens", 4), "--data: there is no file missing.jsonl"),
        (("--data", "missing.jsonl"), "--data needs --new-tokens"),
        (("--data", "missing.jsonl", "--tasks", "cells"), "give --data or --tasks, not both"),
        (("--full", "--run", "steps=half"), "give --full or --run, not both"),
        (("--drift", "--full"), "--drift measures plain decoding"),
        (("--run", "cache=foo"), "--run 'cache=foo': cache: unknown policy 'foo'"),
        (("--model", "some/folder"), "was not trained on the bundled tasks: give --data"),
        (("--out", "/dev/null/x"), "--out: cannot write"),
        (("--tasks", "chess"), "invalid choice: 'chess'"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(run, monkeypatch, words, message):
    monkeypatch.setattr("dkv.load", lambda *_, **__: pytest.fail("a model was loaded"))
    try:
        code, _, err = run("eval", *words)
    except SystemExit as stop:
        code, err = stop.code, ""
    assert code == 2 and (message in err or "chess" in words)


def test_a_policy_that_the_model_cannot_have_is_refused_before_any_run(run, monkeypatch):
    monkeypatch.setattr("dkv.generate", lambda *_, **__: pytest.fail("something was run"))
    code, _, err = run("eval", "--model", "tiny-dream", "--problems", 1, "--run", "cache=decode shift_rule=right")
    assert code == 2 and 'shift_rule "right" caches a slot while' in err


def test_drift_refuses_what_the_model_has_no_room_for(run, folder, data):
    code, _, err = run("eval", "--drift", "--model", folder, "--data", data, "--new-tokens", 300)
    assert code == 2 and "the model has 256" in err
