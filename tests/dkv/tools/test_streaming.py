"""Drafts drawn in a terminal: a small terminal below follows the cursor and tells what a user sees."""

import io
import re
import unicodedata
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import dkv
from dkv.common.bar import Bar
from dkv.tools.streaming import DraftStreamer, ProgressStreamer, wrapped

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
    """The new slots [B, new] of a canvas."""
    return torch.tensor(rows)


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
        progress = ProgressStreamer(2, MASK)
        progress.put(torch.tensor([[0]]))
        progress.put_draft(torch.tensor([[0, 1]]))
        progress.end()
        progress.end()
        assert ("/2 [" in err.getvalue()) is is_terminal


@pytest.mark.parametrize(
    "settings",
    [
        {"block_length": 4, "schedule": "sliding", "cache": "sliding", "most": 3},
        {"block_length": 8, "threshold": 1e-4},
        {"schedule": "time", "steps": 30},
        {"eos_token_id": list(range(0, 64, 2))},
    ],
    ids=["sliding", "threshold", "time", "ends"],
)
def test_progress_ends_at_its_total(llada, monkeypatch, settings):
    """However many steps it takes, which the schedule alone does not tell."""
    done = []
    monkeypatch.setattr(Bar, "update", lambda bar, n=1: done.append(n) or setattr(bar, "n", bar.n + n))
    ids = torch.tensor([[5, 9], [7, 3]])
    progress = ProgressStreamer(2 * 16, llada.spec.mask_token_id)
    output = dkv.generate(llada, ids, max_new_tokens=16, streamer=progress, **settings)
    assert len(done) == output.stats.passes and min(done) >= 0 and sum(done) == 2 * 16


class Letters:
    """A tokenizer of one letter per id, enough for the streamers of transformers."""

    def decode(self, ids, **_):
        return "".join(chr(ord("A") + int(i) % 26) for i in torch.as_tensor(ids).flatten().tolist())


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_streamers_of_transformers(llada, capsys, skip_prompt):
    """The prompt once or not at all, a draft after every step, and the new tokens at last."""
    if not hasattr(transformers, "TextDiffusionStreamer"):
        pytest.skip("this transformers has no TextDiffusionStreamer")
    ids, letters = torch.tensor([[5, 9]]), Letters()
    output = dkv.generate(
        llada, ids, max_new_tokens=4, streamer=transformers.TextDiffusionStreamer(letters, skip_prompt=skip_prompt)
    )
    shown = capsys.readouterr().out
    new = letters.decode(output.sequences[0, 2:])
    assert shown.count("\x1b[33m") == 4
    final = re.sub(r"\x1b7\x1b\[33m.*?\x1b\[0m\x1b8\x1b\[J", "", shown)
    assert final == ("" if skip_prompt else letters.decode(ids)) + new + "\n"
    for count, shown in ((4, final), (0, final.removesuffix(new + "\n") + "\n")):
        streamer = transformers.TextStreamer(letters, skip_prompt=skip_prompt)
        dkv.generate(llada, ids, max_new_tokens=count, streamer=streamer)
        assert capsys.readouterr().out == shown


def test_stream_yields_the_canvas_after_every_step(model):
    ids, call = torch.tensor([[5, 9], [7, 3]]), {"max_new_tokens": [2, 5], "cache": dkv.DecodeCache(3)}
    output = dkv.generate(model, ids, **call, output_history=True)
    states = list(dkv.stream(model, ids, **call))
    assert torch.equal(torch.stack([state.sequences for state in states]), output.history)
    assert [state.stats.passes for state in states] == [1, 2, 3, 4, 5]
    filled = [state.stats.new_tokens for state in states]
    assert filled == sorted(filled) and filled[-1] == 7
    assert torch.equal(states[-1].sequences, output.sequences) and states[-1].kv_cache is not None
    assert [s.sequences.tolist() for s in dkv.stream(model, ids, max_new_tokens=0)] == [ids.tolist()]


def test_stream_checks_at_once_and_may_be_dropped(llada):
    ids, call = torch.tensor([[5, 9]]), {"max_new_tokens": 6, "cache": dkv.DecodeCache(3)}
    with pytest.raises(ValueError, match="input_ids must have shape"):
        dkv.stream(llada, ids[0])
    expected = dkv.generate(llada, ids, **call).sequences
    begun = dkv.stream(llada, ids, **call)
    next(begun), next(begun)
    assert torch.is_grad_enabled()
    # Another one in between, and the first goes on where it was.
    assert torch.equal(list(dkv.stream(llada, ids, **call))[-1].sequences, expected)
    *_, last = begun
    assert torch.equal(last.sequences, expected)
    dropped = dkv.stream(llada, ids, **call)
    next(dropped)
    dropped.close()
    assert torch.equal(dkv.generate(llada, ids, **call).sequences, expected) and torch.is_grad_enabled()
