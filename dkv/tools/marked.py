"""Texts with marked gaps: into token ids and `Gap`s, and back with what was found, byte for byte outside the gaps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dkv.tools.gaps import Gap, Text
from dkv.tools.streaming import DraftStreamer
from dkv.tools.text import ids_of, starts

MARKER = "[MASK]"
# A marker in brackets holds the number of its tokens in them: [MASK:5].
NUMBER = re.compile(r"0{0,9}[1-9][0-9]{0,17}")
BRACKETS = {"]": "[", ">": "<", "}": "{", ")": "("}


@dataclass(frozen=True)
class Marked:
    """A text cut at its markers.

    Attributes:
        pieces: what stands before, between and after the gaps; one more than these.
        gaps: neighbouring markers are one gap.
    """

    pieces: list[str]
    gaps: list[Gap]

    def tokens(self, tokenizer: Any) -> Text:
        """Token ids and gaps. Every piece is tokenised by itself: no token reaches over the border of a gap.

        Raises:
            ValueError: there is no token for a character.
        """
        parts: list[int | Gap] = starts(tokenizer)
        for piece, gap in zip(self.pieces, [*self.gaps, None], strict=True):
            parts += ids_of(tokenizer, piece, add_special_tokens=False) if piece else []
            parts += [] if gap is None else [gap]
        return parts

    def joined(self, fillings: Sequence[str]) -> str:
        """The text with these fillings in its gaps."""
        return "".join(part for pair in zip(self.pieces, [*fillings, ""], strict=True) for part in pair)


def marked(text: str, marker: str = MARKER, own: str | None = None, most: int | None = None) -> Marked:
    """Cut a text at its markers.

    Args:
        marker: stands for a token; in brackets, such as [MASK], also with the number of tokens: [MASK:5].
        own: how the tokenizer writes its mask, which is a marker, too.
        most: a marker without a number stands for a gap of 0 to so many tokens; None: for one token.

    Raises:
        ValueError: the marker is empty, or a number in one is none.
    """
    if not marker:
        raise ValueError("--marker must not be empty")
    pattern = re.escape(marker)
    if len(marker) > 2 and BRACKETS.get(marker[-1]) == marker[0]:
        left, begin, right = map(re.escape, (marker[:-1], marker[0], marker[-1]))
        # Not over the begin of another one: a text of many would take the square of its length.
        pattern = f"{left}(?::(?P<number>[^{begin}{right}]*))?{right}"
    if own:
        pattern = f"{re.escape(own)}|{pattern}"
    bare = Gap(1, 1) if most is None else Gap(0, most)
    pieces, gaps, end = [], [], 0
    for found in re.finditer(pattern, text):
        number = found.groupdict().get("number")
        if number is not None and not NUMBER.fullmatch(number):
            five = f"{marker[:-1]}:5{marker[-1]}"
            raise ValueError(
                f"{found[0]!r} is no gap: write {marker} for one token or {five} for five; or let another --marker "
                "mark the gaps"
            )
        gap = bare if number is None else Gap(int(number), int(number))
        if gaps and found.start() == end:
            gaps[-1] = Gap(gaps[-1].least + gap.least, gaps[-1].most + gap.most)
        else:
            pieces.append(text[end : found.start()])
            gaps.append(gap)
        end = found.end()
    return Marked([*pieces, text[end:]], gaps)


class GapStreamer(DraftStreamer):
    """Redraws the texts in place in a terminal at every step.

    The drafts are decoded as a whole, special tokens written out; what is left there at last are the texts themselves,
    by `finish`.

    Args:
        tokenizer, spec: of the model.
    """

    def __init__(self, tokenizer: Any, spec: Any):
        super().__init__(tokenizer, spec, raw=True)
        super().end()

    def put(self, ids: Tensor) -> None:
        """Nothing is drawn before the first step, and nothing after the last one."""

    def end(self) -> None:
        """The drafts stand until the texts take their place."""

    def finish(self, texts: Sequence[str]) -> None:
        """Write the texts in the place of the drafts."""
        self._draw(list(texts))
        super().end()
