"""Counts per step, known before the first pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dkv import DiffusionConfig
from dkv.core.schedule import block_schedule, time_schedule


def counts(plan):
    return [step.count for step in plan]


def test_C01_steps_are_the_total_over_blocks():
    plan = block_schedule(64, 8, 8)
    assert counts(plan) == [8] * 8 and [s.block for s in plan] == list(range(8))
    with pytest.raises(ValueError, match=r"steps \(4\).*64 new tokens in blocks of 8 need 8"):
        block_schedule(64, 4, 8)
    assert "count=8" in str(DiffusionConfig(max_new_tokens=64, steps=8, block_length=8).plan(shifted=False)[0])


def test_C02_lengths_and_steps_that_do_not_divide():
    plan = block_schedule(10, 7, 4)
    per_block = [sum(s.count for s in plan if s.block == b) for b in range(3)]
    assert per_block == [4, 4, 2] and len(plan) <= 7
    assert [s.stop - s.start for s in plan if s.in_block == 0] == [4, 4, 2]


def test_C04_more_steps_than_slots():
    assert counts(block_schedule(4, 10, 4)) == [1, 1, 1, 1]
    assert counts(block_schedule(7, 4, 7)) == [2, 2, 2, 1]


def test_time_schedule_truncates_in_float32():
    # As the published code: nothing in the first step, one in each, two in the last.
    assert counts(time_schedule(24, 24, 1e-3, by_chance=False)) == [0, *[1] * 22, 2]
    assert counts(time_schedule(24, 12, 1e-3, by_chance=False)) == [1, *[2] * 10, 3]


def test_time_schedule_by_chance_frees_everything_in_the_last_step():
    plan = time_schedule(8, 5, 1e-3, by_chance=True)
    assert counts(plan) == [None] * 5 and plan[-1].probability == 1.0
    assert all(0 < step.probability < 1 for step in plan[:-1])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_block_schedule_fills_every_slot_once(new, steps, block):
    blocks = -(-new // block)
    if steps < blocks:
        with pytest.raises(ValueError, match="steps"):
            block_schedule(new, steps, block)
        return
    plan = block_schedule(new, steps, block)
    assert len(plan) <= steps and all(step.count >= 1 for step in plan)
    assert [s.index for s in plan] == list(range(len(plan)))
    for start in range(0, new, block):
        own = [s for s in plan if s.start == start]
        assert sum(s.count for s in own) == own[0].stop - start == min(block, new - start)
        assert [s.in_block for s in own] == list(range(len(own)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 100))
def test_time_schedule_fills_every_slot_once(new, steps):
    assert sum(counts(time_schedule(new, steps, 1e-3, by_chance=False))) == new
