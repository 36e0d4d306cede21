"""Gaps of unknown length: how many tokens are missing, and which.

A masked diffusion model fills the slots that there are and cannot add one, so the length of a gap must be known before
it is filled. Here every length up to a limit is tried, and the text around the gap decides: with n masks in the gap,
how likely are the given tokens beside it? Where n is wrong they stand too near to each other or too far apart. The
score of n is the estimate of their log-likelihood by `dkv.tools.likelihood`, in nats. All are scored on the same
tokens and masked at the same places, so that none is favoured for being short or long, and nothing has to be filled
to find out. If all lengths were equally likely beforehand, the best score would be that of the likeliest length, by
Bayes' rule.

That is a heuristic, and ours. That the confidence in the filling itself favours some lengths, whatever the text, is
known (Liu et al., "Diffusion LMs Can Approximate Optimal Infilling Lengths Implicitly", 2026); `python -m
dkv.bench.accuracy.gaps` counts how often either finds the true length on the bundled models.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, groupby, pairwise, takewhile
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor

from dkv.core.validation import plain
from dkv.engine.config import DiffusionConfig
from dkv.engine.generate import infill, infill_config
from dkv.engine.inputs import check_settings
from dkv.engine.output import Stats
from dkv.engine.records import RECORDS
from dkv.engine.settings import BY_ROW
from dkv.tools.likelihood import Copy, masked_places, terms_of
from dkv.tools.text import padded

# Given tokens on each side of a gap that are scored, masked copies of a candidate, and copies in a pass.
REACH, SAMPLES, COPIES = 16, 8, 32


@dataclass(frozen=True)
class Gap:
    """A gap in a text, of `least` to `most` tokens.

    Raises:
        ValueError: not whole numbers with 0 <= least <= most and 1 <= most.
    """

    least: int
    most: int

    def __post_init__(self):
        numbers = (self.least, self.most)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers) or not 0 <= self.least <= self.most > 0:
            raise ValueError(f"a gap must be of 0 <= least <= most tokens, most at least 1, got {numbers}")


@dataclass
class FilledGaps:
    """What `fill_gaps` returns.

    Attributes:
        rows: token ids of every text, filled.
        fillings: by row and gap, the tokens found.
        scores: by row and gap, the score of every length that was tried; empty where the length was known.
        stats: of the whole call; the passes that scored lengths are among `passes` and the slots.
    """

    rows: list[list[int]]
    fillings: list[list[list[int]]]
    scores: list[list[dict[int, float]]]
    stats: Stats = field(repr=False)


# A text with gaps: token ids, and a `Gap` wherever something is missing.
Text = Sequence[int | Gap]
# The same as token ids, gap, token ids, ..., token ids. A gap whose length is known is so many masks.
Parts = list[list[int] | Gap]


@torch.no_grad()
def fill_gaps(
    model: Any,
    texts: Sequence[Text],
    generation_config: DiffusionConfig | None = None,
    streamer: Any = None,
    **overrides: Any,
) -> FilledGaps:
    """Fill the gaps of texts, where it need not be known how long they are.

    The lengths are chosen first, gap by gap from left to right, then all texts are filled in one call of `dkv.infill`.
    While a gap is decided those before it have the lengths found for them, and the text ends before the next one that
    is not decided yet: k gaps of up to N tokens cost k (N + 1) candidates and not (N + 1)^k, but a gap is not
    decided a second time when more is known.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        texts: of each the token ids from left to right, with a `Gap` in each place where tokens are missing.
            Neighbouring gaps are one, of as many tokens as both may have.
        generation_config, overrides: as for `dkv.infill`. Guidance has no part in the choice of lengths.
        streamer: as for `dkv.infill`; gets the texts [B, L] with masks when their lengths are chosen.

    Returns:
        `FilledGaps`. All but the gaps is as it was given.

    Raises:
        TypeError: the model, the texts or the configuration are of the wrong kind.
        ValueError, IndexError: the texts or settings are impossible, or a gap of unknown length has no text beside it,
            or is to be filled by a model with blocks; before anything is computed. The logits hold NaN.

    Example:
        >>> dkv.fill_gaps(model, [[5, 9, dkv.Gap(0, 8), 3, dkv.Gap(2, 2)]]).fillings
    """
    config = infill_config(generation_config, overrides)
    check_settings(model, config)
    cut = [_cut(text) for text in _listed(texts)]
    _check(model, cut, config)
    search, begin, mask_id = Stats(), time.perf_counter(), model.spec.mask_token_id
    scores: list[list[dict[int, float]]] = []
    for parts in cut:
        for at in range(1, len(parts), 2):
            if parts[at].least == parts[at].most:
                parts[at] = [mask_id] * parts[at].most
        scores.append([])
        for at in range(1, len(parts), 2):
            found = _scores(model, parts, at, search) if isinstance(parts[at], Gap) else {}
            if found:
                # Of equal scores the shorter length: there is no reason for more.
                parts[at] = [mask_id] * max(found, key=found.get)
            scores[-1].append(found)
    ids, real = (t.to(model.device) for t in padded([_known(parts) for parts in cut]))
    output = infill(model, ids, real, generation_config=config, streamer=streamer)
    rows, fillings = [], []
    for row, parts in zip(output.sequences.tolist(), cut, strict=True):
        ends = list(accumulate(map(len, parts)))
        rows.append(row[: ends[-1]])
        fillings.append([row[start:end] for start, end in pairwise(ends)][::2])
    counts = ("passes", "full_passes", "computed_slots", "total_slots", "skipped_slots")
    more = {name: getattr(output.stats, name) + getattr(search, name) for name in counts}
    return FilledGaps(rows, fillings, scores, replace(output.stats, seconds=time.perf_counter() - begin, **more))


def _cut(text: Text) -> Parts:
    """A text cut at its gaps; neighbouring ones are joined."""
    parts: Parts = [[]]
    for is_gap, run in groupby(text, key=lambda part: isinstance(part, Gap)):
        if is_gap:
            gaps = list(run)
            parts += [Gap(sum(gap.least for gap in gaps), sum(gap.most for gap in gaps)), []]
        else:
            parts[-1] = list(run)
    return parts


def _known(parts: Parts) -> list[int]:
    """The tokens up to the first gap whose length is open."""
    return list(chain(*takewhile(lambda part: not isinstance(part, Gap), parts)))


def _scores(model: Any, parts: Parts, at: int, stats: Stats) -> dict[int, float]:
    """The score of every length that the gap in a place may have."""
    mask_id, gap = model.spec.mask_token_id, parts[at]
    left, right = _known(parts[:at]), _known(parts[at + 1 :])
    # Slots of given tokens, those to the right counted from the end of the gap. Nothing predicts the first slot of
    # a shifted model.
    before = [i for i in range(model.spec.shifted, len(left)) if left[i] != mask_id][-REACH:]
    after = [i for i in range(len(right)) if right[i] != mask_id][:REACH]
    masks = masked_places(len(before) + len(after), SAMPLES, random.Random(0))
    copies = []
    for length in range(gap.least, gap.most + 1):
        text = [*left, *[mask_id] * length, *right]
        beside = [*before, *(len(left) + length + i for i in after)]
        for places, weight in masks:
            hidden = [beside[place] for place in sorted(places)]
            reads = [(slot, text[slot], length) for slot in hidden]
            tokens = [mask_id if slot in hidden else token for slot, token in enumerate(text)]
            copies.append(Copy(tokens, reads, [length], weight, shift=int(model.spec.shifted)))
    scores = dict.fromkeys(range(gap.least, gap.most + 1), 0.0)
    for _, terms in terms_of(model, copies, COPIES, stats):
        for length, term in terms:
            scores[length] += term
    return scores


def _listed(texts: Any) -> list[list[Any]]:
    """The texts as lists; ids that are numbers of numpy or torch as those of Python."""
    kinds = Sequence | Tensor | ndarray
    if isinstance(texts, str) or not isinstance(texts, kinds):
        raise TypeError(f"texts must be a list of texts, such as [[5, 9, dkv.Gap(0, 8), 3]], got {texts!r}")
    for text in texts:
        if isinstance(text, str) or not isinstance(text, kinds):
            raise TypeError(f"a text must be a list of token ids and gaps, such as [5, dkv.Gap(0, 8), 3], got {text!r}")
    return [[part if isinstance(part, Gap) else plain(part) for part in text] for text in texts]


def _check(model: Any, texts: list[Parts], config: DiffusionConfig) -> None:
    spec = model.spec
    if spec.attention != "full" and any(gap.least < gap.most for parts in texts for gap in parts[1::2]):
        raise ValueError(
            "the length of a gap is found from the text on both sides, and a block-causal model does not see what "
            "stands behind a block: give every gap its length"
        )
    if not texts:
        raise ValueError("texts holds no text")
    if records := [name for name in RECORDS if getattr(config, f"output_{name}")]:
        raise ValueError(f"output_{records[0]} has no effect on fill_gaps: fill the rows that it finds by dkv.infill")
    for name in BY_ROW:
        if isinstance(value := getattr(config, name), list) and len(value) != len(texts):
            raise ValueError(f"{name} is a list of {len(value)}, but there are {len(texts)} texts")
    for row, parts in enumerate(texts):
        name, tokens, gaps = f"text {row + 1} of {len(texts)}", list(chain(*parts[::2])), parts[1::2]
        given, most = len(tokens), sum(gap.most for gap in gaps)
        if given + most > spec.max_positions:
            raise ValueError(
                f"{name} has {given} tokens and gaps of up to {most}, which need {given + most} positions; the model "
                f"has {spec.max_positions}: shorten the text or its gaps"
            )
        if given <= spec.shifted and any(gap.least < gap.most for gap in gaps):
            raise ValueError(f"{name} has a gap of unknown length and no text beside it, by which it is found")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ValueError(f"{name} must hold token ids and gaps, got {token!r}")
            if not 0 <= token < spec.vocab_size:
                raise IndexError(f"{name} must hold ids in 0..{spec.vocab_size - 1}, got {token}")
            if token == spec.mask_token_id:
                raise ValueError(f"{name} holds the mask id {token}: write Gap(1, 1) in its place")
        config.plan(bool(spec.shifted), row=row, to_fill=most)
