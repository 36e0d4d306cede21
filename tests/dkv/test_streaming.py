"""Drafts drawn in a terminal: a small terminal below follows the cursor and tells what a user sees."""

import io
import re
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dkv.streaming import DraftStreamer, ProgressStreamer, wrapped

END, MASK = 98, 99
SPEC = SimpleNamespace(mask_token_id=MASK, eos_token_id=END)
WORDS = ["a", "bc", " ", "\n", "漢", "e\u0301", "\t", "\r", "\x1b", "longer", "é"]
SPECIAL = {END: "<end>", MASK: "<mask>"}
CODES = re.compile(r"\x1b\[(\d*(?:;\d+)*)([AJm])|(.)", re.DOTALL)


class Tokenizer:
    eos_token_id = END

    def decode(self, ids, skip_special_tokens=False):
        return "".join(WORDS[i] if i < len(WORDS) else "" if skip_special_tokens else SPECIAL[i] for i in ids)


class Terminal(io.StringIO):
    """What a screen shows after the writes so far: `rows`, those scrolled out at the top included."""

    def __init__(self, columns=80, lines=24):
        super().__init__()
        self.columns, self.lines = columns, lines
        self.rows, self.row, self.column, self.style, self.styles = [""], 0, 0, "", {}

    def write(self, text):
        super().write(text)
        for argument, code, char in CODES.findall(text):
            if code == "m":
                self.style = "" if argument == "0" else argument
            elif code == "A":
                self.row = max(self.row - int(argument), len(self.rows) - self.lines, 0)
            elif code == "J":
                assert self.column == 0
                self.rows[self.row :] = [""]
            elif char == "\n":
                self._next_row()
            else:
                assert char not in "\r\x1b\t", "moves the cursor"
                width = 0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) == "W")
                if self.column + width > self.columns:
                    self._next_row()
                self.rows[self.row] += char
                self.column += width
                self.styles[char] = self.style
        return len(text)

    def _next_row(self):
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append("")


@pytest.fixture
def terminal(monkeypatch):
    """Make a terminal of a size: terminal(columns=10, lines=5)."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    def make(columns=80, lines=24):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        return Terminal(columns, lines)

    return make


def canvas(*rows):
    """A canvas [B, 2 + new] with prompts of two ids that are never shown."""
    return torch.tensor([[0, 9, *row] for row in rows])


def test_a_draft_takes_the_place_of_the_one_before(terminal):
    screen = terminal(columns=6)
    screen.write("$ dkv\n")
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    streamer.put(torch.tensor([[0, 9]]))
    streamer.put_draft(canvas([MASK] * 7))
    assert screen.rows == ["$ dkv", "░░░░░", "░░", ""]
    streamer.put_draft(canvas([0, MASK, MASK, 3, 1, MASK, MASK]))
    assert screen.rows == ["$ dkv", "a░░", "bc░░", ""]
    streamer.put_draft(canvas([0, 0, 0, 3, 1, 3, MASK]))
    assert screen.rows == ["$ dkv", "aaa", "bc", "░", ""]
    streamer.put(canvas([0, 0, 0, 3, 1, 3, 9]))
    streamer.end()
    assert screen.rows == ["$ dkv", "aaa", "bc", "longer", ""]


def test_new_tokens_stand_out(terminal):
    screen = terminal()
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    streamer.put(torch.tensor([[0, 9]]))
    streamer.put_draft(canvas([MASK, 0, MASK]))
    assert screen.styles == {"░": "2", "a": "1;32"}
    streamer.put_draft(canvas([1, 0, MASK]))
    assert screen.styles == {"░": "2", "a": "", "b": "1;32", "c": "1;32"}


def test_no_colour_where_it_is_not_wanted(terminal, monkeypatch):
    screen = terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    streamer.put(torch.tensor([[0, 9]]))
    streamer.put_draft(canvas([MASK, 0, MASK]))
    assert screen.getvalue() == "░a░\n"


@pytest.mark.parametrize(("raw", "draft", "final"), [(False, "a░", "aa"), (True, "a░<end>b", "aa<end>bc")])
def test_the_text_ends_at_its_end(terminal, raw, draft, final):
    screen = terminal()
    streamer = DraftStreamer(Tokenizer(), SPEC, raw=raw, file=screen)
    streamer.put(torch.tensor([[0, 9]]))
    streamer.put_draft(canvas([0, MASK, END, 1]))
    assert screen.rows[0].startswith(draft)
    streamer.put(canvas([0, 0, END, 1]))
    assert screen.rows == [final, ""]


def test_rows_of_a_batch_start_on_lines_of_their_own(terminal):
    screen = terminal(columns=6)
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    streamer.put(torch.tensor([[0, 9], [0, 9]]))
    streamer.put_draft(canvas([MASK] * 6, [0] * 6))
    assert screen.rows == ["░░░░░", "░", "aaaaa", "a", ""]
    streamer.put(canvas([1] * 6, [0] * 6))
    assert screen.rows == ["bcbcbc", "bcbcbc", "aaaaaa", ""]


def test_a_text_higher_than_the_screen_is_shown_once(terminal):
    screen = terminal(lines=4)
    screen.write("$ dkv\n")
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    streamer.put(torch.tensor([[0, 9]]))
    lines = [0, 3] * 6
    for done in range(0, 13, 4):
        streamer.put_draft(canvas(lines[:done] + [MASK] * (12 - done)))
        assert screen.rows[0] == "$ dkv" and len(screen.rows) <= 5
    streamer.put(canvas(lines))
    assert screen.rows == ["$ dkv", *"aaaaaa", "", ""]


def test_a_streamer_serves_again_after_end(terminal):
    screen = terminal()
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    for word in (0, 1):
        streamer.put(torch.tensor([[0, 9]]))
        streamer.put_draft(canvas([MASK, MASK]))
        streamer.put(canvas([word, word]))
        streamer.end()
    assert screen.rows == ["aa", "bcbc", ""]


def test_without_new_tokens_nothing_is_shown(terminal):
    screen = terminal()
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    streamer.put(torch.tensor([[0, 9]]))
    streamer.put(canvas([]).long())
    assert screen.rows == ["", ""]


@settings(max_examples=50, deadline=None)
@given(
    drafts=st.lists(st.lists(st.sampled_from([*range(len(WORDS)), MASK]), min_size=9, max_size=9), min_size=1),
    columns=st.integers(5, 12),
)
def test_whatever_the_text_one_draft_is_on_the_screen(drafts, columns):
    screen = Terminal(columns)
    screen.write("$ dkv\n")
    streamer = DraftStreamer(Tokenizer(), SPEC, file=screen)
    streamer.put(torch.tensor([[0, 9]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("LINES", "24")
        for draft in drafts:
            streamer.put_draft(canvas(draft))
            assert screen.rows[0] == "$ dkv" and screen.rows[-1] == ""
            shown = "".join(screen.rows[1:])
            assert shown.count("░") == draft.count(MASK)
            assert shown.count("漢") == draft.count(WORDS.index("漢"))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("abcdef", ["abcd", "ef"]),
        ("abcd\n", ["abcd", ""]),
        ("漢漢漢", ["漢漢", "漢"]),
        ("a漢漢", ["a漢", "漢"]),
        ("e\u0301" * 5, ["e\u0301" * 4, "e\u0301"]),
        ("a\tb", ["a   ", " b"]),
        ("a\x1b[2Jb", ["a\ufffd[2", "Jb"]),
    ],
)
def test_wrapped(text, lines):
    assert wrapped([("old", text)], 4) == lines


def test_progress_shows_in_a_terminal_alone(monkeypatch):
    for is_terminal in (False, True):
        err = io.StringIO()
        err.isatty = lambda answer=is_terminal: answer
        monkeypatch.setattr("sys.stderr", err)
        progress = ProgressStreamer(2)
        progress.put(torch.tensor([[0]]))
        progress.put_draft(torch.tensor([[0, 1]]))
        progress.end()
        progress.end()
        assert ("/2 [" in err.getvalue()) is is_terminal
