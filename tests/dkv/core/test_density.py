"""Certainty density: how much of what stands around a slot is known."""

import math

import pytest
import torch

from dkv.core.density import Density
from dkv.core.sequences import Sequences

MASK = 63


def rows_of(*texts):
    """Texts of `.` (given), `f` (to fill and filled) and `m` (still masked), padded to the longest; and their masks."""
    size = max(map(len, texts))
    real, fill, masked = (
        torch.tensor([[what(text[i : i + 1]) for i in range(size)] for text in texts])
        for what in (bool, lambda c: c in ("f", "m"), lambda c: c == "m")
    )
    rows = Sequences(torch.zeros(len(texts), size, dtype=torch.int64), real, fill, MASK)
    return rows, masked


def plain(text, sigma):
    """The definition, slot by slot, by number of the slots of the answer."""
    to_fill = [i for i, c in enumerate(text) if c in "fm"]
    first, last = to_fill[0], to_fill[-1]
    size = last - first + 1

    def known(i):
        if i > last:
            return last < len(text) - 1 or text[last] == "f"
        return i < first or text[i] != "m"

    def weight(distance):
        return math.exp(-(distance**2) / (2 * sigma**2))

    whole = sum(weight(d) for d in range(-3 * size, 3 * size))
    return {
        j: sum(weight(i - j) for i in range(first - size, last + size + 1) if known(i)) / whole
        for j in range(first, last + 1)
    }


TEXTS = (
    "...mmmmmm",
    "..fmfmffm",
    "..mmmffff",
    "m",
    "....f",
    "mm.fm...m.",
    "." * 90 + "mf" * 40 + "m" * 20,
    "." * 5 + "m" * 150,
)


@pytest.mark.parametrize("sigma", [0.25, 1.0, 3.0, 10.0, 200.0])
def test_the_definition(sigma):
    for text in TEXTS:
        rows, masked = rows_of(text)
        found = Density(sigma, rows)(masked)[0]
        for slot, expected in plain(text, sigma).items():
            assert found[slot].item() == pytest.approx(expected, abs=1e-12), (text, slot)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 10.0, 40.0])
def test_a_row_has_the_same_densities_in_company_bit_for_bit(sigma):
    together = rows_of(*TEXTS)
    found = Density(sigma, together[0])(together[1])
    for row, text in zip(found, TEXTS, strict=True):
        rows, masked = rows_of(text)
        answer = slice(text.index(text.strip(".")[0]), len(text.rstrip(".")))
        assert torch.equal(row[answer], Density(sigma, rows)(masked)[0][answer])


def test_what_is_far_from_everything_known_has_none():
    rows, masked = rows_of("." + "m" * 40)
    density = Density(1.0, rows)(masked)[0]
    assert (density[1:].diff() <= 0).all() and density[1] > 0.1 and density[-1] == 0
    assert density.log()[-1] == -torch.inf
