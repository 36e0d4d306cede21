"""Rows that end before their budget: end tokens, stopping criteria; and processors of logits."""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)  # fmt: skip
from transformers.generation import EosTokenCriteria, LogitsProcessor, StoppingCriteria

import dkv

MASK, EOS = 63, 62


def surest_first(order, token=7, eos_at=()):
    """A script that fills slots 2, 3, ... in an order given by their number, with an end token at some."""

    def script(call, positions):
        logits = torch.zeros(*positions.shape, 64)
        for number, place in enumerate(order):
            slot = positions == place + 2
            logits[..., EOS if place in eos_at else token] += slot * (20.0 - number)
        return logits

    return script


def test_B10_an_end_token_ends_a_row_once_all_before_it_is_decoded(stub):
    """The end is placed at slot 5 first: 0 to 4 are still decoded, 6 and 7 are not."""
    model = stub(surest_first([5, 0, 1, 2, 3, 4, 6, 7], eos_at=[5]))
    output = dkv.generate(model, torch.tensor([[1, 2]]), max_new_tokens=8, eos_token_id=EOS, output_history=True)
    assert output.history[0, 0, 2:].tolist() == [MASK] * 5 + [EOS] + [MASK] * 2
    assert output.sequences[0, 2:].tolist() == [7] * 5 + [EOS] * 3
    assert output.stats.passes == len(model.calls) == 6 and output.stats.new_tokens == 6
    full = dkv.generate(model, torch.tensor([[1, 2]]), max_new_tokens=8)
    assert full.sequences[0, 2:].tolist() == [7] * 5 + [EOS] + [7, 7] and full.stats.passes == 8


def test_the_first_of_several_ends_counts_and_the_rest_is_padding(stub):
    model = stub(surest_first([6, 5, 0, 1, 2, 3, 4, 7], eos_at=[3, 6]))
    call = {"max_new_tokens": 8, "steps": 2}
    output = dkv.generate(model, torch.tensor([[1, 2]]), **call, eos_token_id=[9, EOS], pad_token_id=0)
    assert output.sequences[0, 2:].tolist() == [7, 7, 7, EOS, 0, 0, 0, 0]
    assert output.stats.new_tokens == 4
    # Padding is that of the model, or else the first end id.
    assert dkv.generate(model, torch.tensor([[1, 2]]), **call, eos_token_id=[EOS, 9]).sequences[0, -1] == EOS


def test_an_end_id_in_the_prompt_ends_nothing(llada):
    ids = torch.tensor([[EOS, 5, EOS]])
    call = {"max_new_tokens": 6, "vocab_limit": 60}
    assert torch.equal(
        dkv.generate(llada, ids, **call, eos_token_id=EOS).sequences, dkv.generate(llada, ids, **call).sequences
    )


@pytest.mark.parametrize("cache", [dkv.NoCache(), dkv.DecodeCache(2), dkv.DualCache()], ids=str)
def test_rows_that_end_early_cost_nothing_later(model, cache):
    """Every row stops where its own first end token stands, and the others go on."""
    ids = torch.arange(1, 13).view(6, 2)
    call = {"max_new_tokens": 12, "block_length": 4, "cache": cache}
    whole = dkv.generate(model, ids, **call)
    # The id that is most frequent, as an end.
    eos = int(whole.sequences[:, 2:].flatten().mode().values)
    output = dkv.generate(model, ids, **call, eos_token_id=eos, pad_token_id=0, output_active=True)
    for found, every in zip(output.sequences[:, 2:].tolist(), whole.sequences[:, 2:].tolist(), strict=True):
        end = every.index(eos) + 1 if eos in every else 12
        assert found == every[:end] + [0] * (12 - end)
    assert output.stats.computed_slots < whole.stats.computed_slots
    left = output.active.any(2)
    assert (left[1:] <= left[:-1]).all() and not left[-1].all()


class Seen(StoppingCriteria):
    """Stops where a text ends with an id; keeps what it is shown."""

    def __init__(self, end):
        self.end, self.seen = end, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([input_ids[0, -1] == self.end])


def test_criteria_see_a_text_that_grows_by_one(stub):
    """Slots 3, 2, 5 and 4 are filled in this order, each with its own number."""

    def script(call, positions):
        order = torch.tensor([9, 9, 1, 0, 3, 2, 4, 5])[positions.clamp(max=7)]
        return torch.nn.functional.one_hot(positions, 64) * (20.0 - order.unsqueeze(-1))

    criterion = Seen(5)
    output = dkv.generate(stub(script), torch.tensor([[1, 2]]), max_new_tokens=6, stopping_criteria=criterion)
    assert criterion.seen == [[1, 2, 2], [1, 2, 2, 3], [1, 2, 2, 3], [1, 2, 2, 3, 4], [1, 2, 2, 3, 4, 5]]
    assert output.sequences[0].tolist() == [1, 2, 2, 3, 4, 5, 0, 0]
    assert output.stats.passes == 4


def test_criteria_of_transformers_are_honoured_row_by_row(llada, padded):
    rows = [[5, 9, 11], [7, 3, 20, 41, 8]]
    ids, mask = padded(rows)
    call = {"max_new_tokens": 8, "pad_token_id": 0}
    lists = StoppingCriteriaList([MaxLengthCriteria(9)])
    output = dkv.generate(llada, ids, mask, stopping_criteria=lists, **call)
    whole = dkv.generate(llada, ids, mask, **call).sequences
    assert output.sequences[0, 5:].tolist() == [*whole[0, 5:11].tolist(), 0, 0]
    assert output.sequences[1, 5:].tolist() == [*whole[1, 5:9].tolist(), 0, 0, 0, 0]
    late = dkv.generate(llada, ids, mask, stopping_criteria=[MaxTimeCriteria(0.0)], **call)
    assert late.stats.passes == 1 and not (late.sequences == MASK).any()


def test_criteria_are_not_asked_about_the_prompt(llada):
    """A chat template ends with the very token that ends an answer."""
    ids, call = torch.tensor([[5, 9, EOS]]), {"max_new_tokens": 8, "vocab_limit": 60}
    expected = dkv.generate(llada, ids, **call).sequences
    assert torch.equal(dkv.generate(llada, ids, **call, stopping_criteria=EosTokenCriteria(EOS)).sequences, expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"stopping_criteria": 5}, TypeError, "stopping_criteria must be callable"),
        ({"logits_processor": [5]}, TypeError, "logits_processor must be callable"),
        ({"logits_processor": lambda ids, scores: None}, ValueError, r"must return scores \[3, 64\], got NoneType"),
        ({"logits_processor": lambda ids, scores: scores[:, :9]}, ValueError, r"scores \[3, 64\], got \[3, 9\]"),
        (
            {"generation_config": GenerationConfig()},
            TypeError,
            "generation_config must be a dkv.DiffusionConfig, got Gen",
        ),
    ],
    ids=["criterion", "processor", "nothing", "fewer", "configuration"],
)
def test_what_cannot_be_called_or_used_is_named(llada, given, error, message):
    with pytest.raises(error, match=message):
        dkv.generate(llada, torch.tensor([[5, 9]]), max_new_tokens=3, **given)


def test_no_end_ids_are_none(llada):
    ids = torch.tensor([[5, 9]])
    expected = dkv.generate(llada, ids, max_new_tokens=3)
    assert torch.equal(dkv.generate(llada, ids, max_new_tokens=3, eos_token_id=[]).sequences, expected.sequences)


def test_processors_of_transformers_are_honoured(model, padded):
    rows = [[5, 9, 11], [7, 3, 20, 41, 8]]
    ids, mask = padded(rows)
    call = {"max_new_tokens": 8, "cache": dkv.DecodeCache(3)}
    plain = dkv.generate(model, ids, mask, **call).sequences[:, 5:]
    gone = sorted(set(plain.flatten().tolist()))
    processor = SuppressTokensLogitsProcessor(gone, device="cpu")
    for given in (processor, [processor], LogitsProcessorList([processor])):
        output = dkv.generate(model, ids, mask, logits_processor=given, **call)
        assert not torch.isin(output.sequences[:, 5:], torch.tensor([*gone, MASK])).any()
    dkv.generate(model, ids, mask, logits_processor=NoRepeatNGramLogitsProcessor(2), **call)
    same = dkv.generate(model, ids, mask, logits_processor=lambda ids, scores: scores, **call)
    assert torch.equal(same.sequences[:, 5:], plain)
    drawn = {"temperature": 0.8, "seed": 1, **call}
    same = dkv.generate(model, ids, mask, logits_processor=lambda ids, scores: scores, **drawn)
    assert torch.equal(same.sequences, dkv.generate(model, ids, mask, **drawn).sequences)


@pytest.mark.parametrize(
    "settings",
    [{"selection_temperature": 0.5}, {"cache": "greedy", "threshold": 0.3}, {"output_confidences": True}],
    ids=str,
)
def test_a_processor_goes_with_what_looks_at_every_entry(llada, padded, settings):
    """The entries of a pass are filled up, and a processor sees none of those that fill."""
    ids, mask = padded([[5, 9, 11], [7]])
    call = {"max_new_tokens": [7, 5], "seed": 2, **settings}
    expected = dkv.generate(llada, ids, mask, **call)
    found = dkv.generate(llada, ids, mask, logits_processor=lambda ids, scores: scores, **call)
    assert torch.equal(found.sequences, expected.sequences)


class Shapes(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids[0].tolist(), tuple(scores.shape), len(input_ids)))
        return scores


def test_a_processor_sees_one_row_without_padding(llada, padded):
    ids, mask = padded([[5, 9, 11], [7]])
    processor = Shapes()
    dkv.generate(llada, ids, mask, max_new_tokens=4, steps=1, logits_processor=processor)
    assert processor.seen == [([5, 9, 11, *[MASK] * 4], (4, 64), 4), ([7, *[MASK] * 4], (4, 64), 4)]
