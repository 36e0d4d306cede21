"""Slots that a policy hides, or that stop early, in a trace and what is made of it."""

import numpy as np
import pytest

import dkv
from dkv.tools import trace
from dkv.tools.trace.record import FULL, HIDDEN, KINDS, STOPPED
from tests.dkv.tools.test_trace import IDS, Tokens, embedded, near, pixels


def test_what_is_not_seen_is_shown_as_such(model):
    """Blocks of 2 slots behind a prompt of 4, a window of 1 and a tail of 1."""
    cache = dkv.SuffixWindow(window=1)
    found = trace.record(model, Tokens(), IDS, max_new_tokens=8, block_length=2, cache=cache, schedule="blocks")
    hidden = [np.flatnonzero(row == HIDDEN).tolist() for row in found.kinds]
    assert hidden == [[7, 8, 9, 10]] * 2 + [[9, 10]] * 2 + [[]] * 4
    assert [row["hidden"] for row in found.to_dict()["steps"]] == [[[7, 11]]] * 2 + [[[9, 11]]] * 2 + [[]] * 4
    assert found.full.tolist() == [True, False] * 4 and (found.kinds[0] == FULL).sum() == 8
    assert found.stats.full_passes == 4 and found.computed_share == found.computed.mean()
    figure, at = pixels(found)
    assert near(at(0, 9), "not seen") and near(at(0, 11), "full pass") and near(at(1, 0), "reused")
    assert KINDS[HIDDEN] in [text.get_text() for text in figure.legends[0].get_texts()]


def test_what_stopped_early_is_shown_as_such(model):
    """Blocks of 4 slots, half of which go on after the first of two layers."""
    cache = dkv.SkipCache("1/2@0", block_every=4)
    found = trace.record(model, Tokens(), IDS, max_new_tokens=8, block_length=4, cache=cache, schedule="blocks")
    stopped = found.kinds == STOPPED
    assert stopped.any(1).tolist() == [False, True, True, True] * 2 and not (stopped & found.through).any()
    assert np.array_equal(stopped, found.computed & ~found.through) and found.full.tolist() == [True] + [False] * 7
    assert found.work.tolist() == ((found.computed.sum(1) + found.through.sum(1)) / 2).tolist()
    assert found.computed_share == pytest.approx(found.stats.computed_share)
    row = found.to_dict()["steps"][1]["stopped"]
    assert [slot for first, end in row for slot in range(first, end)] == np.flatnonzero(stopped[1]).tolist()
    figure, at = pixels(found)
    # In a shifted model a slot that stopped may be the one that is filled: the slot before it predicts it.
    step, slot = np.argwhere(stopped & (found.decoded != np.arange(8)[:, None]))[0].tolist()
    assert near(at(step, slot), "stopped early")
    assert KINDS[STOPPED] in [text.get_text() for text in figure.legends[0].get_texts()]
    assert embedded(trace.page(found))["work"] == found.work.tolist()
