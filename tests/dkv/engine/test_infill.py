"""Filling the masks of a text."""

import pytest
import torch

import dkv

MASK = 63
POLICIES = [
    dkv.NoCache(),
    dkv.DecodeCache(3),
    dkv.DecodeCache(0, shift_rule="un_right"),
    dkv.PrefillCache(),
    dkv.PrefillDecodeCache(3),
    dkv.GreedyCache(3, 2),
    dkv.PrefixCache(),
    dkv.DualCache(),
    dkv.DualCache(delayed=True),
    dkv.SuffixWindow(2),
    dkv.SuffixWindow(0, 0, "dual"),
    dkv.Rollout(0.3, 3, 4.0),
    dkv.ElasticCache(3, 0.99),
]


@pytest.mark.parametrize("cache", POLICIES, ids=str)
def test_C09_every_mask_is_filled_and_nothing_else_touched(model, cache):
    text = torch.tensor([[5, MASK, 7, MASK], [MASK, 2, 3, 4], [1, 2, 3, 4], [MASK] * 4])
    output = dkv.infill(model, text, cache=cache)
    assert output.sequences.shape == text.shape and not (output.sequences == MASK).any()
    assert torch.equal(output.sequences[text != MASK], text[text != MASK])
    assert output.stats.new_tokens == 7 and output.stats.passes == 4


def test_masks_behind_a_prompt_are_a_generation(model):
    prompt, call = (
        torch.tensor([[5, 9, 3]]),
        {"block_length": 2, "cache": dkv.DecodeCache(3), "temperature": 0.7, "seed": 3},
    )
    expected = dkv.generate(model, prompt, max_new_tokens=6, **call)
    output = dkv.infill(model, torch.cat((prompt, torch.full((1, 6), MASK)), 1), **call)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.stats.computed_slots == expected.stats.computed_slots


def test_one_mask_takes_the_best_token_of_a_plain_pass(llada, dream):
    text = torch.tensor([[5, 9, MASK, 3, 8]])
    for model, source in ((llada, 2), (dream, 1)):
        logits = model(text)[0, source]
        logits[MASK] = -torch.inf
        assert dkv.infill(model, text).sequences[0, 2] == logits.argmax()


def test_blocks_count_masks(llada):
    """Blocks of two masks, from left to right, whatever stands between them."""
    text = torch.tensor([[MASK, 5, MASK, 7, 8, MASK, MASK, 9, MASK]])
    output = dkv.infill(llada, text, block_length=2, cache=dkv.DualCache(), output_history=True, output_active=True)
    left = [(row[0] == MASK).nonzero().flatten().tolist() for row in output.history]
    assert left[1] == [5, 6, 8] and left[3] == [8] and left[4] == []
    assert output.active.sum(2).flatten().tolist() == [9, 2, 9, 2, 9]


def test_padding_is_no_text_to_fill(llada):
    text, real = torch.tensor([[MASK, MASK, 5, MASK]]), torch.tensor([[0, 0, 1, 1]])
    output = dkv.infill(llada, text, real)
    assert output.sequences[0, :3].tolist() == [MASK, MASK, 5] and output.sequences[0, 3] != MASK
    assert output.stats.total_slots == 2


def test_what_does_not_go_with_infill(llada):
    text = torch.tensor([[5, MASK]])
    for name in ("max_new_tokens", "gen_length"):
        with pytest.raises(ValueError, match="max_new_tokens does not go with infill"):
            dkv.infill(llada, text, **{name: 4})
    with pytest.raises(ValueError, match="5 new tokens in blocks of 1 need 5"):
        dkv.infill(llada, torch.full((1, 5), MASK), block_length=1, steps=2)
    # An end id of a checkpoint's configuration ends nothing here.
    config = dkv.DiffusionConfig(eos_token_id=list(range(63)))
    assert dkv.infill(llada, torch.full((1, 5), MASK), generation_config=config).stats.new_tokens == 5


def test_the_mask_may_be_another_id(llada):
    output = dkv.infill(llada, torch.tensor([[5, 40, 7]]), mask_token_id=40)
    assert output.sequences[0, 0] == 5 and output.sequences[0, 1] != 40


def test_streamers_get_the_text_as_it_fills(llada):
    seen = []

    class Streamer:
        def put(self, ids):
            seen.append(ids)

        put_draft = put

        def end(self):
            seen.append(None)

    text = torch.tensor([[5, MASK, 7, MASK]])
    output = dkv.infill(llada, text, streamer=Streamer())
    assert [None if x is None else int((x == MASK).sum()) for x in seen] == [2, 1, 0, 0, None]
    assert torch.equal(seen[0], text) and torch.equal(seen[-2], output.sequences)
