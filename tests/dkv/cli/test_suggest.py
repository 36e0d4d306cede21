"""`dkv suggest`: what is printed and written, and what is refused."""

import json
import shlex

import pytest

from dkv.cli import build_parser
from dkv.cli import suggest as command


def test_the_examples_parse():
    for line in command.EXAMPLES.splitlines():
        if line.startswith("  dkv "):
            words = shlex.split(line.partition("      ")[0])
            assert build_parser().parse_args(words[1:]).run is command.run


def test_a_setting_is_named(run, folder, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(3)))
    words = ("suggest", "--model", folder, "--data", data, "--new-tokens", 6, "--batch", 2, "--threads", 1)
    words = (*words, "--run", "cache=decode refresh=2", "--run", "steps=half", "--json", tmp_path / "a.json")
    code, out, _ = run(*words, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and [row["label"] for row in found["rows"]] == ["plain", "decode 2", "plain half"]
    if found["best"] is None:
        assert "Nothing is faster" in out
    else:
        assert out.splitlines()[-1].startswith("dkv.generate(model, ")
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 2 * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lose", -1], "--lose must be between 0 and 100 points, got -1"),
        (["--tasks", "sums"], "--tasks: invalid choice: 'sums'"),
        (["--model", "x/y"], "was not trained on the bundled tasks: give --data FILE, or --tasks"),
        (["--run", "cache=nothing"], "unknown policy 'nothing'"),
        (["--problems", 0], "--problems must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(run, words, message):
    code, out, err = run("suggest", *words)
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
