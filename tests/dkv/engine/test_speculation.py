"""Drafts that a model verifies itself: the text is that of its causal reading, token by token."""

import pytest
import torch

import dkv
from dkv.engine.config import DiffusionConfig
from dkv.engine.run import Run
from tests.dkv.conftest import pad_rows, small_model
from tests.waits import NoWaits

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


@pytest.mark.parametrize(("threshold", "reads"), [(None, 1), (0.0, 1), (0.05, 3)])
def test_a_round_reads_one_report(model, threshold, reads, monkeypatch):
    """And where confidences decide, what is left after each pass over the drafts but the last possible one."""
    monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(x) or tolist(x))
    _, run = Run.after_prompts(
        model, *pad_rows(PROMPTS), DiffusionConfig(max_new_tokens=16, threshold=threshold, **HOW)
    )
    while run.engine.numbers:
        read.clear()
        with torch.no_grad(), NoWaits():
            run.engine.step()
        assert 1 <= len(read) <= reads and read[-1].shape == (3, 2)


def test_the_next_turn_takes_over_what_was_verified(model):
    ids, mask = pad_rows(PROMPTS)
    first = dkv.generate(model, ids, mask, max_new_tokens=12, **HOW)
    turn = torch.cat((first.sequences, torch.tensor([[20, 21, 22], [23, 24, 25]])), 1)
    real = torch.cat((mask, torch.ones(2, 15, dtype=mask.dtype)), 1)
    fresh, output = (
        dkv.generate(model, turn, real, max_new_tokens=6, eos_token_id=[], **given)
        for given in ({}, {"kv_cache": first.kv_cache})
    )
    # Of each row all but its last token, which no pass has read.
    assert torch.equal(output.sequences, fresh.sequences) and output.stats.reused_slots == 10 + 2 * 11


def test_drafts_beyond_the_budget_are_not_handed_on():
    model = small_model(
        attention="prefix_causal", block_length=4, blocks_from_prompt=True, seeded=True, linear_bias=True
    )
    model.head.bias[9] = 1e4  # All drafts are right.
    ids = torch.tensor(PROMPTS[:1])
    first = dkv.generate(model, ids, max_new_tokens=6, threshold=0.0, pad_token_id=0, **HOW)
    assert first.sequences[0, 7:].tolist() == [9] * 6 and first.stats.passes == 1 + 2 * 2
    # The text goes on as the cache is padded.
    turn = torch.cat((first.sequences, torch.tensor([[0, 0, 0]])), 1)
    output = dkv.generate(model, turn, max_new_tokens=4, eos_token_id=[], kv_cache=first.kv_cache)
    assert output.stats.reused_slots == 7 + 6


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
    with pytest.raises(ValueError, match="has no token"):
        dkv.generate(model, torch.tensor(PROMPTS[:1])[:, :0], max_new_tokens=5, **HOW)
    with pytest.raises(ValueError, match="infill"):
        dkv.infill(model, torch.tensor([[5, 63, 3]]), **HOW)
