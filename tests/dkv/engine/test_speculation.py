"""Drafts that a model verifies itself: the text is that of its causal reading, token by token."""

import pytest
import torch

import dkv
from tests.dkv.conftest import pad_rows, small_model

PROMPTS = [[5, 9, 3, 8, 1, 44, 17], [7, 2, 4]]
HOW = {"schedule": "speculative", "eos_token_id": []}


@pytest.fixture
def model():
    return small_model(attention="prefix_causal", block_length=4, blocks_from_prompt=True, seeded=True)


def causally(model, prompt, new):
    """The greedy text of the model as a causal one, from nothing for every token."""
    ids = torch.tensor([prompt])
    for _ in range(new):
        logits = model(ids, block_ids=torch.arange(ids.shape[1])[None])[0, -1]
        logits[model.spec.mask_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax().view(1, 1)), 1)
    return ids[0, len(prompt) :]


@pytest.mark.parametrize("threshold", [None, 0.0, 0.05])
def test_the_text_is_that_of_the_causal_model(model, threshold):
    ids, mask = pad_rows(PROMPTS)
    output = dkv.generate(model, ids, mask, max_new_tokens=[11, 7], threshold=threshold, **HOW)
    for row, (prompt, new) in enumerate(zip(PROMPTS, (11, 7), strict=True)):
        assert torch.equal(output.sequences[row, ids.shape[1] :][:new], causally(model, prompt, new))
    assert output.sequences.shape[1] == ids.shape[1] + 11 and output.stats.new_tokens == 18


def test_a_row_ends_behind_its_end_token(model):
    free = dkv.generate(model, torch.tensor(PROMPTS[:1]), max_new_tokens=12, **HOW).sequences[0, 7:]
    end = int(free[5])
    first = (free == end).nonzero()[0, 0]
    how = {**HOW, "eos_token_id": end, "pad_token_id": 0}
    found = dkv.generate(model, torch.tensor(PROMPTS[:1]), max_new_tokens=12, **how).sequences[0, 7:]
    assert torch.equal(found[: first + 1], free[: first + 1]) and not found[first + 1 :].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, "temperature does not go"),
        ({"cache": "decode"}, "cache 'decode' does not go"),
        ({"stopping_criteria": lambda ids, scores: False}, "stopping_criteria does not go"),
        ({"logits_processor": lambda ids, scores: scores}, "logits_processor does not go"),
    ],
)
def test_what_does_not_go_with_drafts(model, given, message):
    with pytest.raises(ValueError, match=message):
        dkv.generate(model, torch.tensor(PROMPTS[:1]), max_new_tokens=5, **HOW, **given)
    with pytest.raises(ValueError, match="infill"):
        dkv.infill(model, torch.tensor([[5, 63, 3]]), **HOW)
