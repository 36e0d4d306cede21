"""Policies are index logic: their slots and their cadence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dkv
from dkv.core.schedule import Step, Timetable, block_schedule
from dkv.core.sequences import Sequences, mask_of, slots_of
from dkv.kernels.plan.op import with_masked_window
from dkv.policies.base import View, sources

S = 10


def mask(*slots, size=S):
    out = torch.zeros(1, size, dtype=torch.bool)
    out[0, list(slots)] = True
    return out


def slots(x):
    return x[0].nonzero().flatten().tolist()


def view(*, masked, fresh=(), planned=None, step=3, prompt=2, size=S, shifted=False, in_block=None, block=None):
    prompts = torch.zeros(1, prompt, dtype=torch.long)
    rows = Sequences.after_prompts(prompts, torch.ones_like(prompts, dtype=torch.bool), [size - prompt], 63)
    rows.masked.copy_(mask(*masked, size=size))
    rows.fresh.copy_(mask(*fresh, size=size))
    one = Step(step, 0, step if in_block is None else in_block, *block or (0, size - prompt), 1, 0)
    now = Timetable([[one]], prompts.device).now()
    return View(rows, now, None if planned is None else torch.tensor([planned]), shifted)


def full_passes(policy, plan, shifted=False):
    steps = Timetable([plan], torch.device("cpu")).steps(0)
    return policy.full(steps, shifted).flatten().nonzero().flatten().tolist()


def test_S08_cadence_of_decode():
    one, two = block_schedule(8, 8, 8), block_schedule(16, 16, 8)
    assert full_passes(dkv.DecodeCache(4), one) == [0, 1, 4]
    assert full_passes(dkv.DecodeCache(4), two) == [0, 1, 4, 8, 9, 12]
    assert full_passes(dkv.DecodeCache(4), one, shifted=True) == [0, 4]
    assert full_passes(dkv.DecodeCache(4, warmup=1), two) == [0, 4, 8, 12]
    assert full_passes(dkv.GreedyCache(2), one) == [0, 2, 4, 6]
    assert full_passes(dkv.PrefillCache(), two) == full_passes(dkv.PrefillDecodeCache(4), two) == [0]


@pytest.mark.parametrize("never", [0, None, 9, 100])
def test_S06_refresh_that_never_comes(never):
    plan = block_schedule(8, 8, 8)
    assert full_passes(dkv.DecodeCache(never), plan) == [0, 1]
    assert full_passes(dkv.GreedyCache(never), plan) == [0]


def test_S06_refresh_1_is_plain_decoding():
    plan = block_schedule(8, 8, 8)
    assert full_passes(dkv.DecodeCache(1), plan) == full_passes(dkv.GreedyCache(1), plan) == list(range(8))


def test_decode_computes_masked_slots_and_those_decoded_last():
    assert slots(dkv.DecodeCache().active(view(masked=(4, 7, 8), fresh=(5,)))) == [4, 5, 7, 8]


def test_S05_shift_rules():
    """[1, 2, M, 7, M]: under "un" slot 1 waits for slot 2, slot 3 for slot 4; slot 2 is stale until a refresh."""
    seen = view(masked=(2, 4), prompt=2, size=5, shifted=True)
    assert slots(dkv.DecodeCache(shift_rule="un").active(seen)) == [1, 3]
    assert slots(dkv.DecodeCache(shift_rule="un_right").active(seen)) == [1, 2, 3, 4]
    first = view(masked=(2, 3), prompt=2, size=5, shifted=True, step=1, fresh=(4,))
    assert 4 in slots(dkv.DecodeCache(shift_rule="un").active(first))
    with pytest.raises(ValueError, match='"right" caches a slot while its output is still needed'):
        dkv.DecodeCache(4, shift_rule="right").check(shifted=True)
    dkv.DecodeCache(1, shift_rule="right").check(shifted=True)
    dkv.DecodeCache(4, shift_rule="right").check(shifted=False)


def test_prefill_keeps_the_slot_that_predicts_the_first_new_one():
    assert slots(dkv.PrefillCache().active(view(masked=(5,), shifted=False))) == list(range(2, S))
    assert slots(dkv.PrefillCache().active(view(masked=(5,), shifted=True))) == list(range(1, S))


def test_prefill_decode_refreshes_all_but_the_prompt():
    policy = dkv.PrefillDecodeCache(4)
    assert slots(policy.active(view(masked=(5, 6), fresh=(4,), step=8))) == list(range(2, S))
    assert slots(policy.active(view(masked=(5, 6), fresh=(4,), step=9))) == [4, 5, 6]


def test_S09_greedy_windows():
    around = torch.tensor([[4]])
    assert slots(with_masked_window(mask(4), mask(2, 3, 7), around, 4)) == [2, 3, 4, 7]
    assert slots(with_masked_window(mask(4), mask(2, 3, 5, 7), around, 2)) == [3, 4, 5]
    assert slots(with_masked_window(mask(4), mask(), around, 4)) == [4]
    # The second window takes what the first has left, in the order of decoding.
    pair, masked = mask(4, 6), mask(3, 5, 7)
    assert slots(with_masked_window(pair, masked, torch.tensor([[6, 4]]), 1)) == [3, 4, 5, 6]
    assert slots(with_masked_window(pair, masked, torch.tensor([[4, 6]]), 1)) == [3, 4, 5, 6]
    masked = mask(5, 7)
    assert slots(with_masked_window(pair, masked, torch.tensor([[6, 4]]), 1)) == [4, 5, 6, 7]


def test_S09_greedy_sets():
    seen = view(masked=(3, 5, 6, 8), fresh=(4,), planned=[5])
    assert slots(dkv.GreedyCache(window=0).active(seen)) == [4, 5]
    assert slots(dkv.GreedyCache(window=2).active(seen)) == [3, 4, 5, 6]
    assert slots(dkv.GreedyCache(window=2, window_center="last").active(seen)) == [3, 4, 5, 6]
    shifted = view(masked=(3, 5, 6, 8), fresh=(3,), planned=[8], shifted=True)
    assert slots(dkv.GreedyCache(window=0).active(shifted)) == [3, 7, 8]


def test_B07_windows_of_rows_with_different_sets():
    masked = torch.stack((mask(2, 3, 7)[0], mask(9)[0]))
    chosen = with_masked_window(torch.zeros_like(masked), masked, torch.tensor([[4], [S]]), 2)
    assert chosen[0].nonzero().flatten().tolist() == [2, 3] and not chosen[1].any()


POLICIES = [
    dkv.DecodeCache(3), dkv.DecodeCache(3, shift_rule="un_right"), dkv.PrefillCache(), dkv.PrefillDecodeCache(3),
    dkv.PrefillDecodeCache(3, shift_rule="un_right"), dkv.GreedyCache(3, 0), dkv.GreedyCache(3, 3),
    dkv.GreedyCache(3, 2, window_center="last"),
    dkv.GreedyCache(3, 5, window_center="last"),
]  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(POLICIES), st.booleans())
def test_needed_slots_are_active(data, policy, shifted):
    """Every slot that may be filled is predicted, and what was filled last is computed once more."""
    prompt, new = data.draw(st.integers(0, 4)), data.draw(st.integers(2, 12))
    size = prompt + new
    state = data.draw(st.lists(st.sampled_from("mfk"), min_size=new, max_size=new))
    masked = [prompt + i for i, s in enumerate(state) if s == "m"]
    fresh = [prompt + i for i, s in enumerate(state) if s == "f"]
    planned = data.draw(st.permutations(masked))[: data.draw(st.integers(1, 3))]
    step = data.draw(st.integers(1, 7))
    seen = view(masked=masked, fresh=fresh, planned=planned, step=step, prompt=prompt, size=size, shifted=shifted)
    active = policy.active(seen)
    assert not (active & ~seen.rows.everywhere).any()
    wanted = mask_of(seen.planned, seen.rows.masked) if policy.plans else seen.rows.masked
    needed = sources(wanted) if shifted else wanted
    assert not (needed & ~active).any()
    if shifted and getattr(policy, "shift_rule", "") == "un":
        return  # this rule may cache a slot that was decoded last: its documented staleness
    assert not (seen.rows.fresh & ~active).any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_slots_and_masks_are_two_forms_of_one_thing(rows):
    x = torch.tensor(rows)
    count = int(x.sum(1).max())
    listed = slots_of(x, count, 7)
    for row, found in zip(x, listed, strict=True):
        own = row.nonzero().flatten().tolist()
        assert found.tolist() == own + [7] * (count - len(own))
    assert torch.equal(mask_of(listed, x), x)
