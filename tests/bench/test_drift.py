"""Drift: distances that can be known beforehand, and the shape of the result."""

import math
from dataclasses import replace

import pytest
import torch

import dkv
from dkv.bench import plots
from dkv.bench.accuracy import drift
from dkv.bench.problems import Problems, bundled


@pytest.fixture(scope="module")
def found():
    model = dkv.load("tiny", device="cpu")
    (whole,) = bundled(["balance"], 2, seed=1)
    problems = [replace(whole, new=32), Problems("short", ["+1 =", "+2 +3="], ["1", "2"], 12)]
    tokenizer = dkv.load_tokenizer("tiny")
    return drift.measure(model, tokenizer, problems, 2) | {
        "facts": {"model": "tiny", "torch": "2", "date": "2026-01-01"}
    }


def test_the_first_layer_depends_on_the_token_alone(found):
    """Its keys and values change when the mask becomes a token, and never else."""
    for kind in drift.NAMES:
        layer = found["change"][kind][0]
        assert layer[drift.REACH] > 0.1
        assert max(layer[: drift.REACH] + layer[drift.REACH + 1 :]) < 1e-5
        assert found["stale"][kind]["at once"][0] > 0.1
        assert found["stale"][kind]["one step later"][0] < 1e-5
        assert found["prompt"][kind][0] < 1e-5


def test_the_largest_change_is_that_of_the_decoding(found):
    for layers in found["change"].values():
        for layer in layers:
            assert max(range(len(layer)), key=layer.__getitem__) == drift.REACH
    assert found["slots"] == 2 * 32 + 2 * 12


def test_later_caching_leaves_less_stale(found):
    for kept in found["stale"].values():
        for once, one, _ in zip(*kept.values(), strict=True):
            assert one < once


def test_8_bits_cost_less_than_half_a_step_of_each_number(found):
    """In the first layer nothing was attended to: numbers are off by a quarter of their scale on average."""
    for kind in drift.NAMES:
        first, *others = found["int8"][kind]
        assert 1e-3 < first < 1e-2 and max(others) < 0.05
        assert max(first, *others) < min(found["stale"][kind]["at once"])


def test_changes_are_sorted_by_the_steps_from_the_decoding():
    # One slot, decoded in pass 2 of 6; the change into pass t is t.
    change = torch.arange(6.0).view(6, 1, 1, 1, 1).expand(6, 2, 3, 1, 1)
    by_offset = drift._by_offset(change, torch.tensor([[2]]))
    assert by_offset.shape == (2 * drift.REACH + 1, 2, 3)
    told = {offset: by_offset[offset + drift.REACH, 0, 0].item() for offset in (-3, -2, -1, 0, 1, 2, 3)}
    assert math.isnan(told.pop(-3)) and math.isnan(told.pop(3))
    assert told == {-2: 1, -1: 2, 0: 3, 1: 4, 2: 5}


def test_table_words_and_figure(found):
    lines = drift.table(found).splitlines()
    assert len(lines) == 2 * (1 + 4) + 1 and lines[0].startswith("keys") and lines[6].startswith("values")
    assert "Keys: " in drift.meaning(found)
    assert len(plots.drift(found).axes) == 4
