"""README and docs/ as a newcomer takes them: examples run as they stand, and links and paths lead somewhere."""

import re
import runpy
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import setuptools

import dkv
from dkv import cli
from dkv.engine.config import DEFAULTS
from dkv.policies import POLICIES, POLICY_OPTIONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in LINKING}

QUICK = ("generate", "infill", "info", "trace", "verify")
# Of the hub, or of the reader.
ELSEWHERE = ("GSAI-ML/", "FOLDER")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


SHELL = [code for page in PAGES for code in blocks(page, "sh")]
# One command a line, where a backslash continues it.
LINES = [line for code in SHELL for line in code.replace("\\\n", " ").splitlines()]
COMMANDS = sorted({line for line in LINES if line.startswith("dkv ")})

# Those within a sentence.
INLINE = sorted({found for text in TEXTS.values() for found in re.findall(r"`(dkv [^`|]*)`", text)})
NAMES = next(action.choices for action in cli.build_parser()._actions if action.dest == "command")


def words(line: str) -> list[str]:
    """The words after the first, without a comment."""
    return shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_blocks_of_a_page_run_and_print_what_they_say(page, tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page.stem}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)
        assert capsys.readouterr().out.splitlines() == re.findall(r"^# -> (.*)$", code, re.M)


def test_the_sum_that_readme_shows_is_right():
    (code,) = blocks(PAGES[0], "python")
    first, second, total = re.search(r'"(\d+)\+(\d+)=".*?# -> (\d+)', code, re.S).groups()
    assert int(first) + int(second) == int(total)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line):
    args, unknown = cli.build_parser().parse_known_args(words(line))
    assert unknown == [] and args.command == words(line)[0]


@pytest.mark.parametrize("line", [line for line in INLINE if "COMMAND" not in line])
def test_a_command_within_a_sentence_has_a_name_and_options_that_exist(line):
    name, *options = words(line)
    text = NAMES[name].format_help()
    assert [option for option in options if option.startswith("--") and f" {option}" not in text] == []


@pytest.mark.parametrize("line", [x for x in COMMANDS if words(x)[0] in QUICK and not any(y in x for y in ELSEWHERE)])
def test_a_quick_command_runs_and_prints(line, tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    assert cli.main(words(line)) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("code", SHELL, ids=lambda code: code.splitlines()[0][:40])
def test_a_shell_block_is_valid(code):
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_modules_and_targets_that_shell_lines_name_are_there():
    modules = {found for line in LINES for found in re.findall(r"python -m (dkv[\w.]*)", line)}
    assert modules and [name for name in modules if find_spec(name) is None] == []
    targets = {found for text in TEXTS.values() for found in re.findall(r"^ *`?make ([a-z]+)", text, re.M)}
    assert targets and targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_paths_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", TEXTS[name])
    paths = re.findall(r"`((?:bench|dkv|docs|kernels|models|tests)/[\w./-]*)`", TEXTS[name])
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_no_setting_policy_or_command_is_left_out():
    table = re.search(r"^\| setting .*?\n\n", TEXTS["docs/generation.md"], re.M | re.S)[0]
    listed = [name for line in table.splitlines()[:-1] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(listed) == sorted(DEFAULTS)
    assert set(re.findall(r"\*\*`(\w+)`\*\*", TEXTS["docs/policies.md"])) == set(POLICY_OPTIONS)
    policies = {policy.__name__ for policy in POLICIES.values()}
    for page in ("README.md", "docs/policies.md"):
        assert set(re.findall(r"^\| `(\w+)\(.*?\)` ", TEXTS[page], re.M)) == policies
    assert set(re.findall(r"^\| `dkv (\w+)` ", TEXTS["docs/cli.md"], re.M)) == set(NAMES)


def test_every_page_is_in_the_index_and_every_figure_says_where_it_is_from():
    index = TEXTS["docs/README.md"]
    assert [page.name for page in PAGES[1:] if f"({page.name})" not in index and page.name != "README.md"] == []
    comments = re.findall(r"<!-- from: (.*) -->", "".join(TEXTS.values()))
    sources = {path for comment in comments for path in comment.split(", ") if "/" in path}
    assert len(sources) > 5 and [path for path in sources if not (ROOT / path).is_file()] == []


def test_the_package_describes_itself_without_links_that_break(monkeypatch):
    told = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert told["version"] == dkv.__version__
    assert re.search(rf"^## {re.escape(dkv.__version__)} ", TEXTS["CHANGELOG.md"], re.M)
    description = told["long_description"]
    assert "docs/generation.md" in description and "![" not in description
    assert [link for link in re.findall(r"\]\((.*?)\)", description) if not link.startswith("https://")] == []
