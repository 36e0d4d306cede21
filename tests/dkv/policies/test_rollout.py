"""`Rollout` against the rule told slot by slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dkv
from dkv.core.density import Density
from dkv.core.schedule import Timetable, block_schedule
from dkv.core.sequences import Sequences
from dkv.policies.base import View

MASK = 63


def plain(policy, text, step, confidence, importance, density, shifted):
    """The slots of a row: a text of `.` given, `k` known, `f` just filled, `m` masked; lists by slot."""
    to_fill = [i for i, c in enumerate(text) if c != "."]
    masks = [i for i in to_fill if text[i] == "m"]
    rank = {slot: place for place, slot in enumerate(to_fill)}
    score = {i: (-(confidence[i] + density[i]), i) for i in masks}
    size, end = step.stop - step.start, len(to_fill)
    if len(masks) >= policy.current_k:
        last = rank[masks[policy.current_k - 1]]
        end = next(e for e in range(step.stop, len(to_fill) + size, size) if last < e)
    block = [i for i in masks if step.start <= rank[i] < step.stop]
    first = block if step.in_block > 0 else []
    region = [i for i in masks if rank[i] < end]
    best = sorted(region, key=lambda i: (i not in first, score[i]))[: policy.current_k]
    best += sorted(block, key=score.get)[: max(len(block) - step.left, 1)]
    chosen = {max(i - 1, 0) if shifted else i for i in best} | {i for i, c in enumerate(text) if c == "f"}
    others = sorted((i for i in range(len(text)) if i not in chosen), key=lambda i: (-importance[i], i))
    total, taken = sum(importance[i] for i in others), 0.0
    for place, slot in enumerate(others):
        taken += importance[slot]
        if place and taken > policy.rollout_p * total:
            break
        chosen.add(slot)
    for left, right in zip(sorted(chosen), sorted(chosen)[1:], strict=False):
        if right - left <= policy.inflate_w:
            chosen |= set(range(left, right))
    return chosen


@st.composite
def states(draw):
    text = draw(st.text("..kfmmm", min_size=1, max_size=24))
    new = sum(c != "." for c in text)
    length = draw(st.integers(1, max(new, 1)))
    plan = block_schedule(new, new, length)
    step = draw(st.sampled_from(plan)) if plan else None
    if step is not None:
        # Blocks before the current one are full.
        ranks = iter(range(new))
        text = "".join(
            "k" if c == "m" and r < step.start else c for c, r in ((c, next(ranks) if c != "." else 0) for c in text)
        )
    levels = st.lists(st.sampled_from([-5.0, -2.0, -1.0, -0.5, -0.01]), min_size=len(text), max_size=len(text))
    shares = st.lists(st.integers(0, 9), min_size=len(text), max_size=len(text))
    return text, plan, step, draw(levels), draw(shares)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(states(), min_size=1, max_size=4), st.booleans(), st.sampled_from([0.0, 0.1, 0.45, 1.0]),
    st.integers(1, 9), st.integers(0, 4),
)  # fmt: skip
def test_the_rule_slot_by_slot(batch, shifted, share, most, width):
    policy = dkv.Rollout(share, most, 2.0, width)
    size = max(len(text) for text, *_ in batch)
    fields = [[text[i : i + 1] for i in range(size)] for text, *_ in batch]
    real, fill, masked, fresh = (
        torch.tensor([[c in kinds and c != "" for c in row] for row in fields]) for kinds in (".kfm", "kfm", "m", "f")
    )
    rows = Sequences(torch.zeros(len(batch), size, dtype=torch.int64), real, fill, MASK)
    rows.begin([plan for _, plan, *_ in batch], lambda now: now.index < 0)
    rows.masked.copy_(masked)
    rows.fresh.copy_(fresh)
    for row, (_, _, step, *_) in enumerate(batch):
        if step is not None:
            rows.timetable.current[row] = rows.timetable.table[row, step.index]
    wide = [torch.tensor([x[i] + [0] * (size - len(x[i])) for x in batch]) for i in (3, 4)]
    wide[1] = wide[1].double()
    density = Density(policy.sigma, rows)(rows.masked)
    active = policy.active(View(rows, rows.timetable.now(), None, shifted, *wide, density))
    for row, (text, _, step, confidence, importance) in enumerate(batch):
        if "m" not in text:
            continue  # a finished row computes nothing, whatever the policy says
        expected = plain(policy, text, step, confidence, importance, density[row].log().tolist(), shifted)
        assert set(active[row].nonzero().flatten().tolist()) == expected


def test_cadence():
    def full(policy, plan):
        steps = Timetable([plan], torch.device("cpu")).steps(0)
        return policy.full(steps, False).flatten().nonzero().flatten().tolist()

    two = block_schedule(16, 16, 8)
    assert full(dkv.Rollout(), two) == full(dkv.Rollout(refresh=0), two) == [0]
    assert full(dkv.Rollout(refresh=3), two) == [0, 3, 6, 8, 11, 14]
    assert full(dkv.Rollout(refresh=1), two) == list(range(16))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"rollout_p": 1.5}, "rollout_p must be between 0 and 1, got 1.5"),
        ({"current_k": 0}, "current_k must be a whole number of at least 1, got 0"),
        ({"sigma": 0}, "sigma must be between 0.25 and 1000, got 0"),
        ({"inflate_w": -1}, "inflate_w must be a whole number of at least 0, got -1"),
        ({"refresh": 1.5}, "refresh must be a whole number of at least 0, got 1.5"),
    ],
)
def test_impossible_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        dkv.Rollout(**argument)


def test_what_has_no_confidence_is_refused():
    for cause, name in (({"cache": "rollout"}, "cache='rollout'"), ({"certainty": 10}, "certainty")):
        with pytest.raises(ValueError, match=f"{name} needs a confidence to go by"):
            dkv.DiffusionConfig(confidence="random", **cause)


def test_nothing_left_out_is_plain_decoding(model):
    """With all masks and all importance every slot is computed."""
    ids, call = torch.tensor([[5, 9, 11], [7, 3, 20]]), {"max_new_tokens": 8, "block_length": 4}
    output = dkv.generate(model, ids, cache=dkv.Rollout(1.0, 99), **call)
    assert torch.equal(output.sequences, dkv.generate(model, ids, **call).sequences)
    assert output.stats.computed_share == 1


@pytest.mark.parametrize("cache", [dkv.Rollout(0.3, 2, 4.0), dkv.ElasticCache(2)], ids=lambda cache: cache.name)
def test_streams_and_ends(model, cache):
    """Drafts are those of `generate`, and a row that ends early takes padding."""
    ids = torch.tensor([[5, 9, 11], [7, 3, 20]])
    free = dkv.generate(model, ids, max_new_tokens=12, block_length=6, cache=cache)
    end = int(free.sequences[0, 6])
    call = {"max_new_tokens": 12, "block_length": 6, "cache": cache, "eos_token_id": end, "pad_token_id": 0}
    output = dkv.generate(model, ids, **call)
    *drafts, last = dkv.stream(model, ids, **call)
    assert torch.equal(last.sequences, output.sequences) and len(drafts) == output.stats.passes - 1
    assert output.stats.computed_slots < free.stats.computed_slots
    found = output.sequences[0, 3:].tolist()
    assert set(found[found.index(end) + 1 :]) <= {0}


@pytest.mark.parametrize("cache", [None, "decode", "greedy", "dual", "rollout"])
def test_certainty_fills_from_what_is_known(model, cache):
    """A narrow density outweighs every confidence: slots are filled from left to right."""
    ids, call = torch.tensor([[5, 9, 11]]), {"max_new_tokens": 6, "cache": cache, "output_history": True}
    output = dkv.generate(model, ids, schedule="blocks", certainty=0.25, **call)
    assert [(row == 63).sum().item() for row in output.history[:, 0]] == [5, 4, 3, 2, 1, 0]
    for row in output.history[:, 0, 3:] == 63:
        assert (row.int().diff() >= 0).all()
