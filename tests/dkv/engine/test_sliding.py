"""The sliding schedule and its policy: regions, blocks and computed slots of whole generations, by plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dkv
from dkv import DiffusionConfig
from dkv.core.sequences import Sequences
from dkv.core.sliding import Region
from dkv.tools import trace

MASK = 63


def begun(row, region, steps=None):
    """A row, 1 where it is to be filled, before its first step."""
    fill = torch.tensor([row]).bool()
    rows = Sequences(torch.ones_like(fill, dtype=torch.long), torch.ones_like(fill), fill, MASK)
    plan = DiffusionConfig(
        max_new_tokens=sum(row), steps=steps, schedule="sliding", block_length=region.block_length, most=region.most
    ).plan(shifted=False)
    rows.begin([plan], lambda now: now.in_block == 0, region)
    return rows


def after(rows, *filled):
    """The step that follows once these slots are filled."""
    rows.masked[0, list(filled)] = False
    rows.timetable.follow(rows.masked, rows.rank)
    return told(rows)


def told(rows):
    """Index, in_block, start, stop and moved of the step that comes next."""
    now = rows.timetable.now()
    assert now.full.item() == (now.in_block.item() == 0)
    return tuple(int(x) for x in (now.index, now.in_block, now.start, now.stop, now.moved))


def to_fill(rows):
    now = rows.timetable.now()
    return int(rows.open(now).sum() - now.left)


def test_the_region_grows_by_what_is_filled_and_follows_the_first_mask():
    rows = begun([0, 0, *[1] * 8], Region(3, None))
    assert told(rows) == (0, 0, 0, 3, 0)
    assert after(rows, 3) == (1, 1, 0, 4, 0)
    assert after(rows, 2) == (2, 2, 2, 5, 2)
    # Three were filled since the full pass, which counts.
    assert after(rows, 6) == (3, 0, 2, 6, 0)
    assert after(rows, 4, 5, 7) == (4, 0, 6, 8, 4)


def test_the_region_has_an_end_of_its_own():
    rows = begun([0, 0, *[1] * 8], Region(3, 4))
    assert after(rows, 3, 4) == (1, 1, 0, 4, 0)
    assert after(rows, 2) == (2, 0, 3, 6, 3)


def test_slots_that_are_given_count_for_moves_and_not_for_the_region():
    rows = begun([0, 1, 0, 0, 1, 1, 0, 1, 1], Region(2, None))
    assert told(rows) == (0, 0, 0, 2, 0)
    assert after(rows, 1) == (1, 1, 1, 3, 3)


def test_slots_that_a_short_region_has_no_room_for_are_filled_later():
    rows = begun([1] * 8, Region(4, 2), steps=4)
    assert told(rows)[2:4] == (0, 2) and to_fill(rows) == 2
    # One mask is left before the end of the region.
    assert after(rows, 1)[2:4] == (0, 2) and to_fill(rows) == 1
    rows = begun([1] * 8, Region(4, 3), steps=4)
    assert after(rows, 1)[2:4] == (0, 3) and to_fill(rows) == 2
    # Four are due, and three are open.
    assert after(rows, 0)[2:4] == (2, 5) and to_fill(rows) == 3


def expected(masked, lengths, policy, block_length, most, shifted):
    """The slots that every pass computes, [T, B, S], from what is masked before each of them [T, B, S]."""
    found = torch.zeros(masked.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        slots = masked[0, row].nonzero().flatten().tolist()
        begin = begun = None
        for step, now in enumerate(masked[:, row]):
            left = [slot for slot in slots if now[slot]]
            if not left:
                break
            first, filled = left[0], len(slots) - len(left)
            start = slots.index(first)
            stop = min(block_length + filled, len(slots), start + (most or len(slots)))
            moved = 0 if step == 0 else first - begin
            begin = first
            if step == 0 or filled - begun >= block_length:
                found[step, row, :length], begun = True, filled
                continue
            back = min(max(moved, policy.prefix_window, shifted), first)
            found[step, row, first - back : slots[stop - 1] + 1] = True
            new = now & ~(masked[step + 1, row] if step + 1 < len(masked) else torch.zeros_like(now))
            assert set(new.nonzero().flatten().tolist()) <= set(slots[start:stop])
    return found


@st.composite
def asked(draw):
    region = {"block_length": draw(st.integers(1, 6)), "most": draw(st.sampled_from([None, 1, 3, 5]))}
    rule = draw(st.sampled_from([{}, {"threshold": 0.1}, {"threshold": 0.3}, {"factor": 1.5}]))
    return region, rule, dkv.SlidingCache(draw(st.sampled_from([0, 1, 3, 24])))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["llada", "dream"]), asked(), st.data())
def test_passes_are_those_of_the_rule(request_model, padded, name, given, data):
    """In rows of any lengths, with gaps anywhere."""
    model, (region, rule, policy) = request_model(name), given
    slot = st.one_of(st.just(MASK), st.integers(0, 61))
    rows = data.draw(st.lists(st.lists(slot, min_size=1, max_size=16), min_size=1, max_size=3))
    if not any(MASK in row for row in rows):
        return
    ids, mask = padded(rows, "right", pad=0)
    call = {"schedule": "sliding", "cache": policy, **region, **rule}
    output = dkv.infill(model, ids, mask, **call, output_history=True, output_active=True)
    masked = torch.cat((ids[None], output.history[:-1])) == MASK
    found = expected(masked, list(map(len, rows)), policy, **region, shifted=model.spec.shifted)
    assert torch.equal(output.active, found)


@pytest.fixture(scope="module")
def request_model(llada, dream):
    return {"llada": llada, "dream": dream}.__getitem__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": "sliding"}, 'schedule="sliding" needs block_length'),
        ({"block_length": 8, "most": 4}, r'most=4 goes with schedule="sliding"'),
        ({"schedule": "sliding", "block_length": 8, "most": 0}, "most must be a whole number of at least 1"),
        ({"cache": "sliding", "block_length": 8}, "cache 'sliding' follows the region that slides: give schedule"),
        ({"cache": {"name": "sliding", "prefix_window": -1}}, "prefix_window must be a whole number of at least 0"),
        (
            {"schedule": "sliding", "block_length": 16, "most": 8, "max_new_tokens": 64, "steps": 7},
            r"steps \(7\).*64 new tokens in blocks of 8 need 8",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**given)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_settings_that_a_row_shares_with_another(request_model, padded, family):
    """Guidance, ends, drawn tokens, and keys and values of an earlier call: a batch gives what a row gets alone."""
    model, rows = request_model(family), [[5, 9, 3, 8, 4], [7, 2]]
    ids, mask = padded(rows)
    call = {"schedule": "sliding", "block_length": 3, "most": 5, "cache": dkv.SlidingCache(2), "output_active": True}
    for how in ({"cfg_scale": 1.5}, {"eos_token_id": list(range(9, 60, 5))}, {"temperature": 0.8, "threshold": 0.05}):
        both = dkv.generate(model, ids, mask, max_new_tokens=[6, 11], seed=[1, 2], **call, **how)
        for row, (prompt, new) in enumerate(zip(rows, (6, 11), strict=True)):
            one = dkv.generate(model, torch.tensor([prompt]), max_new_tokens=new, seed=row + 1, **call, **how)
            assert torch.equal(both.sequences[row, 5 : 5 + new], one.sequences[0, len(prompt) :])
            computed = both.active[:, row, mask.new_tensor([*mask[row], *[1] * new, *[0] * (11 - new)]).bool()]
            assert torch.equal(computed[: len(one.active)], one.active[:, 0])
            assert not computed[len(one.active) :].any()


def test_the_next_turn_spares_what_the_first_has_computed(model):
    ids = torch.tensor([[5, 9, 3, 8, 7, 2, 40, 11]])
    call = {"schedule": "sliding", "block_length": 3, "cache": dkv.SlidingCache(1)}
    first = dkv.generate(model, ids, max_new_tokens=6, **call)
    second = torch.cat((first.sequences, torch.tensor([[20, 21]])), 1)
    output = dkv.generate(model, second, max_new_tokens=5, kv_cache=first.kv_cache, output_active=True, **call)
    assert output.stats.reused_slots == int(first.kv_cache.seen.sum()) >= 8
    assert torch.equal(output.active[0, 0, :14], ~first.kv_cache.seen[0])


def test_drafts_and_traces(llada):
    """A trace has no places of blocks to show, and the progress of a stream is that of the plan."""
    tokenizer, call = dkv.load_tokenizer("tiny"), {"max_new_tokens": 9, "schedule": "sliding", "block_length": 3}
    drafts = list(dkv.stream(llada, torch.tensor([[1, 2]]), cache="sliding", **call))
    assert len(drafts) == 9 == len(DiffusionConfig(**call).plan(shifted=False))
    model = dkv.load("tiny", device="cpu")
    found = trace.record(model, tokenizer, torch.tensor([[1, 2]]), cache="sliding", **call)
    assert (found.policy, found.blocks, found.steps) == ("SlidingCache()", (2,), 9)


def test_fixed_counts_take_the_steps_that_were_asked_for(model):
    ids = torch.tensor([[5, 9, 3]])
    call = {"schedule": "sliding", "block_length": 4, "output_history": True}
    for steps in (None, 5, 7):
        for cache in (None, "sliding", "dual", "greedy"):
            output = dkv.generate(model, ids, max_new_tokens=12, steps=steps, cache=cache, **call)
            left = (output.history == MASK).sum(2).flatten().tolist()
            counts = [step.count for step in DiffusionConfig(max_new_tokens=12, steps=steps).plan(False)]
            assert [a - b for a, b in zip([12, *left], left, strict=False)] == counts
