"""`dkv trace`: the files that it writes, what it prints, and errors in one line."""

import io
import json

import pytest

from dkv.tools.trace import picture


@pytest.fixture
def call(run, folder):
    return lambda *args: run("trace", "--model", folder, *args)


def test_trace_writes_both_files_and_says_what_was_computed(call, tmp_path):
    options = ("--max-new-tokens", 12, "--cache", "decode", "--refresh", 4, "--seed", 3)
    code, out, err = call("+7 -3=", *options, "--out", tmp_path / "a" / "b", "--json", tmp_path / "c" / "t.json")
    assert (code, err) == (0, "")
    *written, cost = out.splitlines()
    assert written == [str(tmp_path / name) for name in ("a/b/trace.png", "a/b/trace.html", "c/t.json")]
    read = json.loads((tmp_path / "c" / "t.json").read_text())
    computed = [sum(stop - first for first, stop in step["computed"]) for step in read["steps"]]
    slots = len(read["slots"])
    assert [step["full"] for step in read["steps"]].count(True) == 4 and computed[:2] == [slots, slots]
    share = sum(computed) / (12 * slots)
    expected = f"{share:.0%} of the slots computed, 12 passes (4 full), 12 tokens, seed 3"
    assert cost == f"DecodeCache(refresh=4): {expected}"
    assert (tmp_path / "a/b/trace.png").read_bytes().startswith(b"\x89PNG")
    assert "DecodeCache(refresh=4)" in (tmp_path / "a/b/trace.html").read_text("utf-8")
    assert sorted(file.name for file in (tmp_path / "a" / "b").iterdir()) == ["trace.html", "trace.png"]


def test_trace_answers_as_generate_does(call, run, tmp_path):
    options = ("--max-new-tokens", 8, "--cache", "greedy", "--temperature", 1, "--seed", 5)
    assert call("1=", *options, "--out", tmp_path, "--json", tmp_path / "t.json")[0] == 0
    tokens = json.loads(run("generate", "1=", *options, "--json")[1])["tokens"]
    read = json.loads((tmp_path / "t.json").read_text())
    assert [slot["id"] for slot in read["slots"][read["prompt"] :]] == tokens


def test_trace_writes_into_a_folder_of_its_own(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("1=\n"))
    assert call("--max-new-tokens", 2)[:2] == (0, "trace/trace.png\ntrace/trace.html\n" + _cost(2))


def _cost(tokens: int) -> str:
    return f"NoCache(): 100% of the slots computed, {tokens} passes ({tokens} full), {tokens} tokens, seed 1\n"


@pytest.fixture(autouse=True)
def fixed_seed(monkeypatch):
    monkeypatch.setattr("dkv.cli.several.secrets.randbits", lambda bits: 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("1=", "--lines"), "a trace is of one prompt: give PROMPT, or --file FILE"),
        (("1=", "--max-new-tokens", 0), "max_new_tokens is 0"),
        (("1=", "--out", "file"), "--out: cannot write file/trace.png (Not a directory): give another place"),
        (("1=", "--json", "folder"), "--json: cannot write folder (Is a directory): give another place"),
        (("1=", "--cache", "lru"), "unknown policy 'lru'"),
        (("one=", "--max-new-tokens", 2), "no token for"),
        (("-",), "no prompt: standard input is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_trace_are_one_line(call, tmp_path, monkeypatch, args, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert err.startswith("dkv trace: error: ") and err.count("\n") == 1 and message in err


def test_trace_without_matplotlib_stops_before_the_model_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    code, _, err = run("trace", "1=", "--model", "nowhere", "--out", tmp_path / "out")
    assert code == 2 and err == "dkv trace: error: the picture needs matplotlib: pip install 'dkv[bench]'\n"
    assert not (tmp_path / "out").exists()
