"""English text for a bundled model: windows to train on, and passages that training never sees."""

import random
from pathlib import Path

# What a text may hold; all else is written with it or dropped.
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'\"-()\n"
WRITTEN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "-", "\u2013": "-"})
# Of a text, the part at its end that is not trained on.
UNSEEN = 1 / 50


def plain(text: str) -> str:
    """A text in `CHARACTERS`: a space where a line breaks, a line break between paragraphs."""
    paragraphs = (" ".join(part.split()) for part in text.translate(WRITTEN).replace("_", "").split("\n\n"))
    kept = (("".join(c for c in part if c in CHARACTERS)) for part in paragraphs)
    return "\n".join(part for part in kept if part)


class Text:
    """A text cut into what is trained on and what is not.

    Args:
        path: a file in UTF-8, paragraphs separated by empty lines.

    Raises:
        ValueError: the text is too short for windows of `least` characters.
    """

    def __init__(self, path: Path, least: int):
        text = plain(path.read_text("utf-8"))
        cut = int(len(text) * (1 - UNSEEN))
        self.seen, self.unseen = text[:cut], text[cut:]
        if len(self.unseen) < least:
            needed = int(least / UNSEEN)
            raise ValueError(f"{path} has {len(text)} characters in all; a window of {least} needs at least {needed}")

    def window(self, rng: random.Random, length: int, seen: bool = True) -> str:
        """`length` characters from a random place on."""
        text = self.seen if seen else self.unseen
        start = rng.randrange(len(text) - length + 1)
        return text[start : start + length]
