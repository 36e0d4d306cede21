"""Passages that `tiny-text` was not trained on, and holes in them."""

import random
import re
from collections.abc import Sequence

from dkv.models.folders import BUNDLED

PASSAGES = "passages.txt"
# Characters of an opening, of what is written after it, and of a passage with holes.
OPENING, NEW, PASSAGE = 128, 256, 384
# Words of a passage that are taken out at most, of so many letters, this far apart at least and from its ends.
HOLES, LETTERS, APART = 6, range(4, 10), 24


def openings(count: int, seed: int) -> list[str]:
    """The first characters of passages."""
    return [text[:OPENING] for text in _passages(count, random.Random(f"openings-{seed}"))]


def with_holes(count: int, seed: int) -> list[tuple[str, Sequence[tuple[int, int]]]]:
    """Passages, and of each the places (first, after the last) of some of its words."""
    rng = random.Random(f"holes-{seed}")
    return [(text, _holes(text, rng)) for text in _passages(count, rng)]


def _passages(count: int, rng: random.Random) -> list[str]:
    """Windows of the unseen text that begin with a word."""
    text = (BUNDLED["tiny-text"] / PASSAGES).read_text("utf-8")
    places = [match.start() for match in re.finditer(r"\b\w", text[: len(text) - PASSAGE])]
    return [text[start : start + PASSAGE] for start in rng.sample(places, count)]


def _holes(text: str, rng: random.Random) -> list[tuple[int, int]]:
    words = [m.span() for m in re.finditer(r"\b[a-z]+\b", text[APART:-APART]) if len(m.group()) in LETTERS]
    rng.shuffle(words)
    kept: list[tuple[int, int]] = []
    for first, end in words:
        if len(kept) < HOLES and all(first - other[1] >= APART or other[0] - end >= APART for other in kept):
            kept.append((first, end))
    return [(first + APART, end + APART) for first, end in sorted(kept)]
