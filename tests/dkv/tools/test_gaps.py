"""Gaps of unknown length: what is tried, what is chosen, and what stays as it is."""

import numpy as np
import pytest
import torch

import dkv
from dkv.tools import gaps

MASK = 63
TEXT = [5, 9, 3, 8, 7]


def test_gaps_of_known_length_are_filled_as_by_infill(model):
    found = dkv.fill_gaps(model, [[5, dkv.Gap(2, 2), 7, dkv.Gap(1, 1)], TEXT], cache=dkv.DecodeCache(3))
    row = dkv.infill(model, torch.tensor([[5, MASK, MASK, 7, MASK]]), cache=dkv.DecodeCache(3)).sequences[0].tolist()
    assert found.rows == [row, TEXT] and found.fillings == [[row[1:3], row[4:]], []]
    assert found.scores == [[{}, {}], []] and found.stats.passes == 3


def test_every_length_is_tried_and_the_best_score_is_taken(model):
    found = dkv.fill_gaps(model, [[5, 9, 3, dkv.Gap(1, 6), 8, 7]])
    (scores,) = found.scores[0]
    assert list(scores) == [1, 2, 3, 4, 5, 6] and len(found.fillings[0][0]) == max(scores, key=scores.get)
    assert found.rows[0] == [5, 9, 3, *found.fillings[0][0], 8, 7] and MASK not in found.rows[0]
    # 8 masked copies of 6 candidates, in passes of 32.
    assert found.stats.passes == 2 + len(found.fillings[0][0]) and found.stats.seconds > 0


def test_a_score_is_the_log_probability_of_the_text_beside_the_gap(model, monkeypatch):
    """With one copy, in which all of it is masked, or one token of it, as it falls."""
    monkeypatch.setattr(gaps, "masked_places", lambda count, samples, rng: [({0, 2}, 1.5)])
    (scores,) = dkv.fill_gaps(model, [[5, 9, dkv.Gap(0, 3), 8, 7]]).scores[0]
    shifted = int(model.spec.shifted)
    for length, score in scores.items():
        # Slots beside the gap; nothing predicts the first one of a shifted model.
        slots = [*range(shifted, 2), 2 + length, 3 + length]
        text = torch.tensor([5, 9, *[MASK] * length, 8, 7])
        hidden = text.clone()
        hidden[[slots[0], slots[2]]] = MASK
        logits = model(hidden[None])[0].log_softmax(-1)
        expected = 1.5 * sum(logits[slot - shifted, text[slot]].item() for slot in (slots[0], slots[2]))
        assert score == pytest.approx(expected, abs=1e-3)


def test_texts_are_independent(model):
    texts = [[5, 9, dkv.Gap(0, 4), 3, dkv.Gap(2, 2), 1], TEXT, [1, 2, dkv.Gap(0, 3), 3, 4, dkv.Gap(1, 4), 6]]
    together = dkv.fill_gaps(model, texts, seed=1, temperature=0.5)
    for text, row in zip(texts, together.rows, strict=True):
        assert dkv.fill_gaps(model, [text], seed=1, temperature=0.5).rows == [row]


def test_neighbouring_gaps_are_one(model):
    found = dkv.fill_gaps(model, [[5, 9, dkv.Gap(1, 1), dkv.Gap(0, 2), 3, 4]])
    assert list(found.scores[0][0]) == [1, 2, 3] and len(found.fillings[0]) == 1


def test_a_gap_that_is_not_decided_hides_what_is_behind_it(llada):
    """The first gap is chosen by the text up to the second, and this one by all."""
    ends = [[5, 9, dkv.Gap(0, 3), 3, 4, dkv.Gap(0, 2), end] for end in (7, 20)]
    (first, last), (other, different) = dkv.fill_gaps(llada, ends).scores
    assert first == other and last != different
    alone = dkv.fill_gaps(llada, [[5, 9, dkv.Gap(0, 3), 3, 4]]).scores[0][0]
    assert first == alone


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ([], {}, ValueError, "texts holds no text"),
        ([TEXT, [dkv.Gap(0, 4)]], {}, ValueError, "text 2 of 2 has a gap of unknown length and no text beside it"),
        ([[5, dkv.Gap(0, 256)]], {}, ValueError, "gaps of up to 256, which need 257 positions; the model has 256"),
        ([[5, MASK, dkv.Gap(0, 4)]], {}, ValueError, r"holds the mask id 63: write Gap\(1, 1\) in its place"),
        ([[5, 64, dkv.Gap(0, 4)]], {}, IndexError, "must hold ids in 0..63, got 64"),
        ([["5", dkv.Gap(0, 4)]], {}, ValueError, "must hold token ids and gaps, got '5'"),
        ([[5, dkv.Gap(0, 4)]], {"max_new_tokens": 3}, ValueError, "max_new_tokens does not go with infill"),
        ([[5, dkv.Gap(0, 4)]], {"block_length": 1, "steps": 2}, ValueError, "4 new tokens in blocks of 1 need 4"),
        ([[5, dkv.Gap(0, 4)]], {"seed": [1, 2]}, ValueError, "seed is a list of 2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_impossible_calls_are_refused_before_anything_is_computed(llada, monkeypatch, texts, settings, error, message):
    monkeypatch.setattr(llada, "step", lambda *args, **more: pytest.fail("something was computed"))
    with pytest.raises(error, match=message):
        dkv.fill_gaps(llada, texts, **settings)


@pytest.mark.parametrize("numbers", [(0, 0), (-1, 2), (3, 2), (1.0, 2), (True, 2), ("1", 2)])
def test_a_gap_needs_room(numbers):
    with pytest.raises(ValueError, match="a gap must be of 0 <= least <= most tokens"):
        dkv.Gap(*numbers)


def test_what_is_no_text_or_model_is_refused(model):
    for wrong in (None, 5, "abc", {1: [5]}, (n for n in [[5]])):
        with pytest.raises(TypeError, match=r"texts must be a list of texts, such as"):
            dkv.fill_gaps(model, wrong)
    for wrong in (None, 5, "abc", {5: 1}):
        with pytest.raises(TypeError, match=r"a text must be a list of token ids and gaps"):
            dkv.fill_gaps(model, [wrong])
    for wrong in (None, "tiny", torch.nn.Linear(2, 2), type(model)):
        with pytest.raises(TypeError, match=r"model must come from dkv.load"):
            dkv.fill_gaps(wrong, [[5, dkv.Gap(0, 2)]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_history": True}, "output_history has no effect on fill_gaps"),
        ({"output_logits": True}, "output_logits has no effect on fill_gaps"),
        ({"logits_processor": []}, "logits_processor is not a setting here"),
        ({"generator": torch.Generator()}, "generator is not a setting here"),
        ({"eos_token_id": 99}, "eos_token_id must be at most 63"),
        ({"shift_type": "right", "use_cache": True, "cache_type": "decoded"}, "shift_rule"),
    ],
)
def test_settings_are_checked_before_any_length_is_tried(dream, settings, message, monkeypatch):
    monkeypatch.setattr(gaps, "_scores", None)
    with pytest.raises(ValueError, match=message):
        dkv.fill_gaps(dream, [[5, 9, dkv.Gap(0, 2), 7]], **settings)


def test_ids_of_torch_and_numpy_are_ids(model):
    plain = dkv.fill_gaps(model, [[5, 9, dkv.Gap(1, 1), 3]]).rows
    assert dkv.fill_gaps(model, [[*torch.tensor([5, 9]), dkv.Gap(1, 1), np.int64(3)]]).rows == plain
    assert dkv.fill_gaps(model, torch.tensor([[5, 9]])).rows == [[5, 9]]


def test_the_length_of_a_gap_needs_a_model_that_sees_behind_it(build):
    model = build(attention="block", block_length=4)
    with pytest.raises(ValueError, match="give every gap its length"):
        dkv.fill_gaps(model, [[1, 2, dkv.Gap(1, 3), 5]])
