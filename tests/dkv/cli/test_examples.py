"""The examples of the help texts: what a reader copies must run as it stands, and print something."""

import io
import shlex

import pytest

from dkv import cli
from dkv.cli import audit, bench, demo, eval, generate, infill, info, trace, verify

PROMPT = "+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2="
# What the examples read.
FILES = {
    "prompt.txt": PROMPT,
    "prompts.txt": f"{PROMPT}\n#..##.#...#.##..#.#....##.#=\n",
    "texts.txt": f"{PROMPT}51 53[MASK]49 52 55 54\nno gap\n",
}
# Up to minutes each; their arguments are parsed.
MEASURING = (audit, bench, demo, eval, verify)


def examples(*texts):
    """The command lines among the lines of help texts, without what is said of them."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.startswith("  dkv ")]
    return [line.partition("      ")[0].partition("    ")[0] for line in lines]


def cut_at_redirections(line):
    """Arguments, and the file that standard input comes from."""
    words = shlex.split(line)[1:]
    ends = [words.index(sign) for sign in "<>" if sign in words]
    source = words[words.index("<") + 1] if "<" in words else None
    return words[: min(ends, default=len(words))], source


QUICK = [
    line
    for line in examples(cli.EXAMPLES, *(c.EXAMPLES for c in (generate, infill, trace, info)))
    # Weights of the hub are not here; what measures takes minutes, and recorded runs have tests of their own.
    if "GSAI-ML/" not in line and line.split()[1] not in ("demo", "bench", "verify")
]
# As many slots as by default take seconds.
LONG = [line for line in QUICK if line.split()[1] in ("generate", "trace") and "--max-new-tokens" not in line]


@pytest.mark.parametrize("line", [pytest.param(x, marks=pytest.mark.slow) if x in LONG else x for x in QUICK])
def test_an_example_runs_as_it_stands(line, capsys, tmp_path, monkeypatch, one_thread):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    words, source = cut_at_redirections(line)
    monkeypatch.setattr("sys.stdin", io.StringIO(FILES.get(source, "")))
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out.strip() and "empty" not in err


def test_the_examples_of_generate_are_answered_rightly(capsys, one_thread):
    """A reader should see the bundled model at its best, not what it makes of a prompt that it does not know."""
    answers = []
    for line in examples(generate.EXAMPLES)[:2]:
        assert cli.main(cut_at_redirections(line)[0]) == 0
        answers.append(capsys.readouterr().out.strip())
    cells = "/".join(
        (
            "####..##.##.#.###.##..##..#",
            "#...###..#..#.#...#.###.###",
            "##.##..######.##.##.#...#..",
            "#..#.###......#..#..##.###.",
        )
    )
    assert answers == ["51 53 50 51 49 52 55 54 52 53 55 52 51 53 55 54 57 55 52 53 55", cells]


def test_the_examples_that_measure_parse():
    for command in MEASURING:
        for line in examples(command.EXAMPLES):
            assert cli.build_parser().parse_args(cut_at_redirections(line)[0]).run is command.run


def test_an_answer_that_ends_at_once_is_told(capsys, tmp_path, one_thread):
    call = ["generate", "--threshold", "0.9", "--block-length", "16"]
    assert cli.main([*call, "+2 -3 ="]) == 0
    out, err = capsys.readouterr()
    assert out == "\n" and err == (
        "dkv generate: the answer is empty, as the model ended it at once; --raw shows what follows the end\n"
    )
    (tmp_path / "prompts").write_text(f"{PROMPT}\n+2 -3 =\n")
    assert cli.main([*call, "--lines", "--file", str(tmp_path / "prompts")]) == 0
    assert capsys.readouterr().err.startswith("dkv generate: prompt 2: the answer is empty")
    # What was asked for is no fault.
    assert cli.main([*call[:3], "--max-new-tokens", "0", "+2 -3 ="]) == 0
    assert capsys.readouterr().err == ""
