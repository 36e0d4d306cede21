"""Blocks of slots: how they are counted, and which step fills how much of them."""

import pytest

from dkv.core.blocks import BlockRule, slot_schedule
from dkv.core.schedule import quotas, shares


def test_quotas():
    assert quotas(8, 3) == [3, 3, 2] and quotas(3, 8) == [1, 1, 1] and quotas(0, 4) == []
    # 24 / 10 = 2.4, of the 22 left 22 / 9 = 2.44, ...: rounded one by one, as in a recorded run of dllm.
    assert quotas(24, 10, rounded=True) == [2, 2, 2, 3, 3, 2, 2, 3, 2, 3]
    assert sum(quotas(7, 16, rounded=True)) == 7 and all(quotas(7, 16, rounded=True))
    assert shares(10, 4, rounded=False) == [3, 3, 2, 2] and shares(10, 4, rounded=True) == [3] * 4


def told(plan, *names):
    return [tuple(getattr(step, name) for name in names) for step in plan]


def test_blocks_are_counted_from_slot_0():
    """A prompt of 6 slots in blocks of 4: the first block has two slots to fill, and the shares of a whole one."""
    plan = slot_schedule(range(6, 12), 12, BlockRule(4), 4, steps=4)
    assert told(plan, "first", "end", "start", "stop", "count", "least") == [
        (4, 8, 0, 2, 2, 2),
        (8, 12, 2, 6, 2, 2),
        (8, 12, 2, 6, 2, 2),
    ]
    assert BlockRule(4).extra(6, 5) == 1 and BlockRule(4).extra(6, 6) == 0


def test_blocks_are_counted_from_the_prompt():
    plan = slot_schedule(range(6, 15), 15, BlockRule(4, from_prompt=True), 4, steps=None)
    assert [(s.first, s.end) for s in plan if s.in_block == 0] == [(6, 10), (10, 14), (14, 15)]
    assert BlockRule(4, from_prompt=True).extra(6, 5) == 0 and len(plan) == 9


def test_a_seed_ends_the_pass_before_it():
    """Behind a prompt that ends a block, and before every later block, one slot is filled by the pass that stores."""
    plan = slot_schedule(range(8, 24), 24, BlockRule(8, seeded=True), 4, steps=None)
    starts = told([s for s in plan if s.in_block == 0], "first", "end", "part", "part_end", "start", "stop")
    assert starts == [
        *((8, 8, 8, 12, 0, 1), (8, 16, 8, 12, 1, 4), (8, 16, 12, 16, 4, 8)),
        *((16, 16, 16, 20, 8, 9), (16, 24, 16, 20, 9, 12), (16, 24, 20, 24, 12, 16)),
    ]
    # Not behind a prompt that ends inside a block, and not without a prompt.
    assert slot_schedule(range(5, 8), 8, BlockRule(8, seeded=True), 8, None)[0].end == 8
    assert slot_schedule(range(8), 8, BlockRule(8, seeded=True), 8, None)[0].end == 8


def test_slots_to_fill_anywhere():
    plan = slot_schedule([1, 2, 9, 13], 14, BlockRule(4), 4, steps=None)
    assert told([s for s in plan if s.in_block == 0], "first", "end", "start", "stop") == [
        *((0, 4, 0, 2), (8, 12, 2, 3), (12, 14, 3, 4)),
    ]
    assert slot_schedule([], 14, BlockRule(4), 4, steps=3) == []


def test_too_few_steps():
    with pytest.raises(ValueError, match=r"steps \(2\).*3 blocks of 4"):
        slot_schedule(range(6, 14), 16, BlockRule(4), 4, steps=2)
