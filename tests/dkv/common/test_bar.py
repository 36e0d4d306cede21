"""How far a work is: lines where there is no terminal, a bar where there is one."""

import io

import pytest

from dkv.common import process
from dkv.common.bar import Bar, counted


@pytest.fixture(autouse=True)
def name():
    before = process.name()
    process.called("dkv test")
    yield
    process.called(before)


def test_a_line_for_each(capsys):
    with Bar(2, "run", pause=0) as bar:
        bar.set_description("plain, round 1")
        bar.update()
        bar.set_description("decode 8, round 1")
        bar.update()
    assert capsys.readouterr() == (
        "",
        "dkv test: 1 of 2 runs (plain, round 1), 0 s, about 0 s left\ndkv test: 2 of 2 runs (decode 8, round 1), 0 s\n",
    )


def test_what_is_small_is_told_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 1.0, 4.9, 6.0, 7.0, 12.0, 12.5])
    monkeypatch.setattr("dkv.common.bar.time.monotonic", lambda: next(now))
    with Bar(12, "batch") as bar:
        for _ in range(6):
            bar.update(2)
    said = "dkv test: 6 of 12 batches, 6 s, about 6 s left\ndkv test: 10 of 12 batches, 12 s, about 2 s left\n"
    assert capsys.readouterr().err == said


def test_a_short_or_silent_work_is_not_told(capsys):
    for bar in (Bar(2, "run"), Bar(2, "run", pause=0, silent=True)):
        bar.update(2)
        bar.print("a result")
        bar.close()
    assert capsys.readouterr() == ("a result\na result\n", "")


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    with Bar(2, "run", pause=0) as bar:
        bar.update()
        bar.refresh()
        assert bar.n == 1 and "1/2" in shown.getvalue() and "1 of 2" not in shown.getvalue()
    assert "\n" not in shown.getvalue()


@pytest.mark.parametrize(
    ("number", "what", "said"),
    [
        (0, "token", "0 tokens"),
        (1, "token", "1 token"),
        (2, "pass", "2 passes"),
        (1, "pass", "1 pass"),
        (3, "batch", "3 batches"),
    ],
)
def test_one_has_no_plural(number, what, said):
    assert counted(number, what) == said
