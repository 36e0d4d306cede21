"""Arguments of the generate functions: encodings, settings by name, and what is left alone."""

import pytest
import torch
from transformers import BatchEncoding

import dkv
from dkv import DiffusionConfig

IDS = torch.tensor([[5, 9, 3], [1, 2, 3]])
ENCODING = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}


@pytest.mark.parametrize("call", ["generate", "infill", "stream"])
def test_an_encoding_is_taken_apart(llada, call):
    def run(*given, **named):
        output = getattr(dkv, call)(llada, *given, **named, **({} if call == "infill" else {"max_new_tokens": 4}))
        return (list(output)[-1] if call == "stream" else output).sequences

    expected = run(IDS, ENCODING["attention_mask"])
    full = {**ENCODING, "token_type_ids": torch.ones_like(IDS)}
    for found in (run(full), run(BatchEncoding(full)), run(**full), run(**BatchEncoding(ENCODING))):
        assert torch.equal(found, expected)
    for given, error, message in (
        ((full, torch.ones_like(IDS)), ValueError, "attention_mask is given twice"),
        (({"ids": IDS},), ValueError, r"an encoding that holds one, got \['ids'\]"),
        (({**full, "position_ids": IDS},), ValueError, "holds position_ids"),
        ((IDS.tolist(),), ValueError, "input_ids must be a tensor .* got list: give tokenizer"),
        ((IDS, [[1, 1, 1]] * 2), TypeError, "attention_mask must be a tensor .* got list"),
        ((IDS, 128), TypeError, "got int; settings are given by name, such as max_new_tokens=128"),
        ((IDS, DiffusionConfig()), TypeError, "got DiffusionConfig; settings are given by name"),
        ((IDS, None, 128), TypeError, f"{call} takes model, input_ids and attention_mask by position, got 4"),
        ((IDS, None, DiffusionConfig()), TypeError, "generation_config=config"),
    ):
        with pytest.raises(error, match=message):
            run(*given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"generator": 5}, TypeError, "generator must be a torch.Generator, got 5"),
        ({"generator": torch.Generator(), "seed": 0}, ValueError, "generator and seed=0"),
        ({"streamer": 5}, TypeError, "streamer must have put"),
        ({"streamer": DiffusionConfig}, TypeError, "streamer must have put"),
        ({"right_shift_logits": True}, ValueError, "can only be False here.*A2D"),
        ({"generation_tokens_hook_func": lambda step, x, logits: x}, ValueError, "put_draft"),
        ({"generation_logits_hook_func": lambda step, x, logits: logits}, ValueError, "logits_processor"),
        ({"prompt": IDS}, ValueError, "give input_ids="),
        ({"position_ids": IDS}, ValueError, "positions follow from attention_mask"),
        ({"min_new_tokens": 4}, ValueError, "logits_eos_inf=True"),
        ({"stop_strings": ["x"]}, ValueError, "stopping_criteria="),
        ({"return_dict_in_generate": False}, ValueError, "output.sequences"),
    ],
    # Not the values: where an object lies in memory differs from run to run.
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_arguments_of_the_wrong_kind_are_refused_before_a_pass(llada, given, error, message):
    with pytest.raises(error, match=message):
        dkv.generate(llada, IDS, **given)


def test_the_callers_configuration_and_ids_are_left_alone(llada):
    config, ids = dkv.DiffusionConfig(max_new_tokens=4), torch.tensor([[5, 9]])
    dkv.generate(llada, ids, generation_config=config, max_new_tokens=2, cache="decode")
    assert config.max_new_tokens == 4 and config.cache == dkv.NoCache() and ids.tolist() == [[5, 9]]
