"""README as a newcomer takes it: every Python block runs as it stands, and so does every shell line that is quick."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dkv import cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "sh"]
# Outside fenced blocks a command stands on an indented line; a backslash continues it.
LINES = [line.replace("\\\n", " ") for line in re.findall(r"^ {4}(dkv (?:.*\\\n)*.*)$", TEXT, re.M)]
QUICK = ("generate", "infill", "info", "trace")


def arguments(line: str) -> list[str]:
    """The words after `dkv`, without a comment."""
    return shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0][:40])
def test_a_python_block_runs_as_it_stands(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "README"})


def test_the_first_block_prints_the_right_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(PYTHON[0], "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()[0]
    assert int(printed) == sum(map(int, names["prompt"].rstrip("=").split("+")))


@pytest.mark.parametrize("line", LINES)
def test_a_shell_line_is_understood(line):
    args, unknown = cli.build_parser().parse_known_args(arguments(line))
    assert unknown == []
    assert args.command in line


@pytest.mark.parametrize("line", [line for line in LINES if arguments(line)[0] in QUICK and "FOLDER" not in line])
def test_a_quick_shell_line_runs_and_prints(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments(line)) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("code", SHELL, ids=lambda code: code.splitlines()[0][:40])
def test_a_shell_block_is_valid(code):
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_files_that_readme_shows_are_there():
    shown = re.findall(r"!\[[^]]*\]\((\S+?)\)", TEXT) + re.findall(
        r"`((?:bench|tests|dkv|models|kernels)/[\w./-]+)`", TEXT
    )
    assert len(shown) > 10
    assert [name for name in shown if not (ROOT / name).exists()] == []
