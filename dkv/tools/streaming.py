"""Streamers: watch a canvas fill while `dkv.generate` runs.

They follow transformers' convention: `put` the prompts, `put_draft` the new slots after every step, `put` the
new tokens, `end`. Those of transformers serve as well, `TextDiffusionStreamer` among them.
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, TextIO

import torch
from torch import Tensor

from dkv.common.bar import Bar
from dkv.tools.text import answer, until_end

# A mask, and what is drawn in its place where the terminal's encoding lacks it.
MASK, PLAIN_MASK = "░", "#"
# How a terminal is told the style of a piece: faint masks, new tokens bold and green.
STYLES = {"mask": "\x1b[2m", "new": "\x1b[1;32m", "old": ""}
RESET = "\x1b[0m"


def draws_drafts() -> bool:
    """Whether standard output is a terminal in which the cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def drawable(text: str, file: TextIO) -> str:
    """The text with masks that the encoding of the file has."""
    try:
        MASK.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.replace(MASK, PLAIN_MASK)
    return text


def draft_pieces(
    tokenizer: Any, spec: Any, ids: Sequence[int], fresh: Sequence[bool], raw: bool = False
) -> Iterator[tuple[str, str]]:
    """A draft as pieces (style, text), the style one of `STYLES`.

    Neighbouring tokens of one style are decoded together, as a character may span several tokens.

    Args:
        tokenizer, spec: of the model.
        ids: new slots of one row, the mask id where a slot has no token yet.
        fresh: which of them were decoded in the last step.
        raw: as for `dkv.tools.text.answer`.
    """
    shown = ids if raw else until_end(tokenizer, spec, ids)
    styles = ["mask" if i == spec.mask_token_id else "new" if f else "old" for i, f in zip(ids, fresh, strict=True)]
    for style, run in groupby(zip(styles, shown, strict=False), key=lambda pair: pair[0]):
        tokens = [token for _, token in run]
        yield style, MASK * len(tokens) if style == "mask" else tokenizer.decode(tokens, skip_special_tokens=not raw)


class DraftStreamer:
    """Redraws the draft in place in a terminal at every step, and leaves the final text there.

    Args:
        tokenizer, spec: of the model.
        raw: do not cut the text at its end, and write special tokens out.
        file: an ANSI terminal; default: standard output. Colours are left out if the environment
            has NO_COLOR.

    Example:
        >>> dkv.generate(model, input_ids, streamer=DraftStreamer(tokenizer, model.spec))
    """

    def __init__(self, tokenizer: Any, spec: Any, raw: bool = False, file: TextIO | None = None):
        self.tokenizer, self.spec, self.raw = tokenizer, spec, raw
        self.file = sys.stdout if file is None else file
        self.colour = not os.environ.get("NO_COLOR")
        self.end()

    def put(self, ids: Tensor) -> None:
        """Take the prompts [B, P] at first, the new tokens [B, new] at last."""
        if not self._begun:
            self._begun = True
            return
        # Not wrapped, so that the text can be copied and the window resized.
        self._draw([answer(self.tokenizer, self.spec, row, self.raw) for row in ids.tolist()])

    def put_draft(self, ids: Tensor) -> None:
        """Show the new slots [B, new], every row from a line of its own."""
        fresh = torch.ones_like(ids, dtype=torch.bool)
        if self._before is not None:
            # Of a model that writes canvas by canvas, a draft may be longer than the last one.
            known = self._before.shape[1]
            fresh[:, :known] = ids[:, :known] != self._before
        size, lines = shutil.get_terminal_size(), []
        for row, row_fresh in zip(ids.tolist(), fresh.tolist(), strict=True):
            pieces = draft_pieces(self.tokenizer, self.spec, row, row_fresh, self.raw)
            # The last column stays free: a symbol wider than we think must not wrap.
            lines += wrapped(pieces, max(size.columns - 1, 1), self.colour)
        # What has left the screen at its top cannot be drawn again; the last line is for the cursor.
        lines = lines[-max(size.lines - 1, 1) :]
        self._draw(lines)
        self._before, self._height = ids, len(lines)

    def end(self) -> None:
        """Be ready for another generation, also after one that failed."""
        self._begun, self._before, self._height = False, None, 0

    def _draw(self, lines: list[str]) -> None:
        """Write lines in the place of those drawn before; the cursor is left below them."""
        up = f"\x1b[{self._height}A\x1b[J" if self._height else ""
        self.file.write(drawable(up + "".join(line + "\n" for line in lines), self.file))
        self.file.flush()


class ProgressStreamer:
    """A progress bar over the slots to fill on standard error; lines now and then if that is no terminal.

    Steps are not counted: with a threshold, or a region that slides, nobody knows how many there will be.

    Args:
        slots: to fill, of all rows together.
        mask_id: what a slot without a token holds.
    """

    def __init__(self, slots: int, mask_id: int):
        self._bar, self._mask_id = Bar(slots, "token"), mask_id

    def put(self, ids: Tensor) -> None:
        """The bar does not show tokens."""

    def put_draft(self, ids: Tensor) -> None:
        """Show how many of the new slots [B, new] are filled by now; what a row holds beyond its end counts as well."""
        self._bar.update(int((ids != self._mask_id).sum()) - self._bar.n)

    def end(self) -> None:
        """Remove the bar."""
        self._bar.close()


def wrapped(pieces: Iterable[tuple[str, str]], columns: int, colour: bool = True) -> list[str]:
    """Pieces (style, text) as lines that fill at most `columns` of a terminal."""
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0
    for style, text in pieces:
        for char in text.replace("\t", "    "):
            width = 0 if char == "\n" else _columns(char)
            if char == "\n" or used + width > columns:
                lines.append([])
                used = 0
            if char != "\n":
                # A control character would move the cursor, and the next draft to the wrong place.
                lines[-1].append((style, char if unicodedata.category(char) != "Cc" else "\ufffd"))
                used += width
    return ["".join(_painted(line, colour)) for line in lines]


def _columns(char: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _painted(line: list[tuple[str, str]], colour: bool) -> Iterator[str]:
    for style, run in groupby(line, key=lambda cell: cell[0]):
        text = "".join(char for _, char in run)
        yield f"{STYLES[style]}{text}{RESET}" if colour and STYLES[style] else text
