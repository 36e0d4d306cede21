"""Rows are independent: a batch gives each of them exactly the tokens that it gets alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dkv
from dkv.core.sequences import Sequences
from dkv.engine.noise import _SELECTION, Noise
from dkv.engine.settings import ENTROPY_FORMS
from dkv.kernels.common import noise

MASK = 63
POLICIES = [
    dkv.NoCache(),
    dkv.DecodeCache(2),
    dkv.DecodeCache(0, shift_rule="un_right"),
    dkv.DecodeCache(3, warmup=1),
    dkv.PrefillCache(),
    dkv.PrefillDecodeCache(2),
    dkv.GreedyCache(3, 2),
    dkv.GreedyCache(0, 3, "last"),
    dkv.PrefixCache(),
    dkv.DualCache(),
    dkv.PrefixCache(delayed=True),
    dkv.DualCache(delayed=True),
    dkv.SlidingCache(0),
    dkv.SlidingCache(2),
    dkv.SuffixWindow(2),
    dkv.SuffixWindow(0, 0),
    dkv.SuffixWindow(1, 2, "dual"),
    dkv.Rollout(0.3, 3, 4.0, inflate_w=2),
    dkv.Rollout(0.1, 1, 2.0, refresh=3),
    dkv.ElasticCache(2, 0.99),
    dkv.SkipCache("1/2@1/2+1/4@1", block_every=3, prompt_every=5),
    dkv.SkipCache("1/3@0", alpha=1, block_every=0),
]
RULES = st.sampled_from(["probability", "margin", "entropy", "random"])
HOW = ["fixed", "drawn", "threshold", "near", "factor", "entropy"]


@st.composite
def decoding(draw):
    """Settings of any kind that go together."""
    cache = draw(st.sampled_from(POLICIES))
    rule = draw(RULES.filter(lambda rule: rule != "random" or not cache.by_confidence))
    chosen = {"cache": cache, "confidence": rule}
    chosen["certainty"] = draw(st.sampled_from([None, None, 3.0])) if rule != "random" else None
    chosen["block_length"] = draw(st.sampled_from([None, 2, 3, 5]))
    if cache.slides or (cache.slides is None and draw(st.sampled_from([False, False, True]))):
        chosen |= {"schedule": "sliding", "block_length": draw(st.sampled_from([2, 3, 5]))}
        chosen["most"] = draw(st.sampled_from([None, 2, 4]))
    chosen["temperature"] = draw(st.sampled_from([0.0, 0.0, 0.7]))
    chosen["cfg_scale"] = draw(st.sampled_from([0.0, 0.0, 1.5]))
    how = draw(st.sampled_from(HOW)) if rule != "random" else "fixed"
    if how == "drawn":
        chosen["selection_temperature"] = 0.5
    elif how in ("threshold", "near"):
        low, high = (-3, -0.1) if rule == "entropy" else (0.05, 0.9)
        chosen["threshold"] = draw(st.floats(low, high))
        chosen["threshold_decay"] = draw(st.sampled_from([0.0, 0.4, 1.0]))
        if how == "near":
            chosen |= {"near_threshold": draw(st.floats(low, chosen["threshold"])), "radius": draw(st.integers(0, 4))}
    elif how == "entropy":
        chosen |= {"entropy_bound": draw(st.floats(0, 9)), "entropy_form": draw(st.sampled_from(ENTROPY_FORMS))}
    elif how == "factor" and rule != "entropy":
        chosen["factor"] = draw(st.floats(0.1, 2))
    return chosen


@st.composite
def prompts(draw, at_least=0):
    rows = draw(st.lists(st.lists(st.integers(0, 61), min_size=at_least, max_size=9), min_size=1, max_size=4))
    budgets = [draw(st.integers(0, 9)) for _ in rows]
    seeds = [draw(st.sampled_from([1, 2, 2**62])) for _ in rows]
    return rows, budgets, seeds


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["llada", "dream"]), decoding(), prompts(), st.lists(st.integers(0, 61), max_size=8), st.data())
def test_a_row_gets_in_company_what_it_gets_alone(request_model, padded, name, settings, batch, eos, data):
    """Any lengths, budgets, seeds and ends, any policy, rule and schedule, padded on either side."""
    model, (rows, budgets, seeds) = request_model(name), batch
    blocks = max(-(-new // min(settings["block_length"] or 99, settings.get("most") or 99)) for new in budgets)
    steps = data.draw(st.one_of(st.none(), st.integers(max(blocks, 1), blocks + 5)))
    side, filler = data.draw(st.sampled_from(["left", "right"])), data.draw(st.integers(0, 63))
    ids, mask = (x.long() for x in padded(rows, side, filler))
    call = {**settings, "steps": steps, "eos_token_id": eos or None}
    output = dkv.generate(model, ids, mask, max_new_tokens=budgets, seed=seeds, **call)
    width, pad = ids.shape[1], eos[0] if eos else 62
    assert torch.equal(output.sequences[:, :width], ids)
    for row, new, seed, found in zip(rows, budgets, seeds, output.sequences, strict=True):
        prompt = torch.tensor(row, dtype=torch.long)[None]
        alone = dkv.generate(model, prompt, max_new_tokens=new, seed=seed, **call)
        assert torch.equal(found[width : width + new], alone.sequences[0, len(row) :])
        assert (found[width + new :] == pad).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(["llada", "dream"]), decoding(), st.data())
def test_an_infilled_row_gets_in_company_what_it_gets_alone(request_model, padded, name, settings, data):
    """Any number of masks, anywhere; nothing else is touched."""
    slot = st.one_of(st.just(MASK), st.integers(0, 61))
    rows = data.draw(st.lists(st.lists(slot, min_size=1, max_size=14), min_size=1, max_size=4))
    model = request_model(name)
    ids, mask = padded(rows, data.draw(st.sampled_from(["left", "right"])), pad=MASK)
    output = dkv.infill(model, ids, mask, seed=4, **settings)
    for row, found, real in zip(rows, output.sequences, mask.bool(), strict=True):
        given = torch.tensor(row)
        alone = dkv.infill(model, given[None], seed=4, **settings).sequences[0]
        assert torch.equal(found[real], alone) and not (alone == MASK).any()
        assert torch.equal(alone[given != MASK], given[given != MASK]) and (found[~real] == MASK).all()


@pytest.fixture(scope="module")
def request_model(llada, dream):
    return {"llada": llada, "dream": dream}.__getitem__


def test_logits_in_company_are_those_alone(model, padded):
    """Not only their order: bit for bit, as no product depends on how many rows it has."""
    rows = [[5, 9, 11], [7, 3, 20, 41, 8, 30, 2]]
    ids, mask = padded(rows)
    call = {"cache": dkv.DecodeCache(3), "output_logits": True}
    output = dkv.generate(model, ids, mask, max_new_tokens=[6, 9], **call)
    for i, (row, new) in enumerate(zip(rows, (6, 9), strict=True)):
        alone = dkv.generate(model, torch.tensor([row]), max_new_tokens=new, **call)
        for found, expected in zip(output.logits, alone.logits, strict=False):
            real = torch.cat((mask[i].bool(), torch.arange(9) < new))
            torch.testing.assert_close(found[i, real], expected[0], atol=1e-5, rtol=0)


def test_finished_rows_leave_and_later_steps_cost_less(llada):
    ids = torch.tensor([[5, 9], [7, 3], [1, 2]])
    output = dkv.generate(llada, ids, max_new_tokens=[2, 8, 4], output_active=True)
    assert output.active.sum(2).tolist() == [[4, 10, 6]] * 2 + [[0, 10, 6]] * 2 + [[0, 10, 0]] * 4
    assert output.stats.computed_slots == output.stats.total_slots == 2 * 20 + 2 * 16 + 4 * 10
    assert output.stats.new_tokens == 14 and output.stats.passes == 8
    assert output.sequences.tolist()[0][4:] == [62] * 6


def test_rows_keep_their_places_in_what_is_recorded(llada):
    """The first row leaves early; the others move up on the canvas, and not in the output."""
    ids, call = torch.tensor([[5, 9], [7, 3], [1, 2]]), {"cache": dkv.DecodeCache(0, warmup=1)}
    kinds = {"output_history": True, "output_active": True, "output_confidences": True}
    output = dkv.generate(llada, ids, max_new_tokens=[1, 5, 6], **call, **kinds)
    for row, new in enumerate((1, 5, 6)):
        alone = dkv.generate(llada, ids[row : row + 1], max_new_tokens=new, **call, **kinds)
        for name in ("history", "active", "confidences"):
            found, expected = getattr(output, name)[:new, row, : 2 + new], getattr(alone, name)[:, 0]
            torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-5, rtol=0)
    assert not output.active[1:, 0].any() and output.confidences[1:, 0].isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": [4]}, "max_new_tokens is a list of 1, but input_ids has 2 rows"),
        ({"seed": [1, 2, 3]}, "seed is a list of 3, but input_ids has 2 rows"),
        ({"max_new_tokens": [4, 255]}, r"a prompt of 2 tokens and max_new_tokens \(255\) need 257 positions"),
        ({"eos_token_id": 64}, "eos_token_id must be at most 63"),
        ({"pad_token_id": 64}, "pad_token_id must be at most 63"),
    ],
)
def test_impossible_rows_are_named(llada, settings, message):
    with pytest.raises(ValueError, match=message):
        dkv.generate(llada, torch.tensor([[5, 9], [7, 3]]), **settings)


def test_uses_of_noise_do_not_share_numbers(llada):
    """Tokens are keyed by their slot where the random order and the selection of slots have keys of their own."""
    canvas = Sequences.after_prompts(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool), [8], MASK)
    randomness = Noise([1], canvas)
    step, slots = torch.tensor([[3]]), torch.arange(9)
    tokens = noise.uniform(randomness.token_keys(slots, torch.zeros_like(slots), step), 9)
    for other in (randomness.order(step), noise.uniform(randomness._step_keys(_SELECTION, step), 9)):
        assert not (tokens == other).all(1).any()


def test_settings_by_row_in_any_form(llada):
    ids = torch.tensor([[5, 9], [7, 3]])
    expected = dkv.generate(llada, ids, max_new_tokens=[2, 4]).sequences
    for form in ((2, 4), torch.tensor([2, 4]), torch.tensor([2, 4]).numpy()):
        assert torch.equal(dkv.generate(llada, ids, max_new_tokens=form).sequences, expected)
