"""The record of a generation: it is what the generation did."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import dkv
from dkv.tools import trace
from dkv.tools.trace.record import label, texts_of
from tests.dkv.tools.test_trace import IDS, Tokens

CACHES = [dkv.NoCache(), dkv.DecodeCache(3), dkv.PrefillCache(), dkv.PrefillDecodeCache(3), dkv.GreedyCache(3, 2)]


@pytest.mark.parametrize("cache", CACHES, ids=label)
def test_a_trace_is_what_the_generation_did(model, cache):
    call = {"max_new_tokens": 8, "block_length": 4, "cache": cache, "seed": 0}
    kept = {f"output_{name}": True for name in ("history", "active", "confidences")}
    output, found = dkv.generate(model, IDS, **call, **kept), trace.record(model, Tokens(), IDS, **call)
    assert (found.steps, found.slots, found.prompt, found.blocks) == (8, 12, 4, (4, 8))
    assert found.ids.tolist() == output.sequences[0].tolist()
    assert np.array_equal(found.computed, output.active[:, 0])
    assert np.array_equal(found.confidences, output.confidences[:, 0], equal_nan=True)
    for step, canvas in enumerate(output.history[:, 0]):
        assert np.array_equal(found.decoded[4:] > step, canvas[4:] == 63)
    assert (found.decoded[:4] == -1).all()
    stats = output.stats
    if model.spec.shifted:
        assert found.computed_share <= stats.computed_share
        return
    cost = (stats.passes, stats.full_passes, stats.computed_share)
    assert (found.passes, found.full.sum(), found.computed_share) == cost


@pytest.mark.parametrize(("from_prompt", "blocks"), [(False, (4, 6, 9, 12)), (True, (4, 7, 10, 13))])
def test_blocks_are_counted_as_the_model_counts_them(build, from_prompt, blocks):
    model = build(attention="block", block_length=3, blocks_from_prompt=from_prompt)
    found = trace.record(model, Tokens(), IDS, max_new_tokens=10, eos_token_id=[])
    assert found.blocks == blocks and (found.decoded[4:] >= 0).all()


def test_a_step_without_a_pass_and_several_tokens_in_a_step(dream):
    found = trace.record(dream, Tokens(), IDS, max_new_tokens=8, steps=3, confidence="random", cache="decode", seed=0)
    assert found.steps == found.passes <= 3 and set(found.decoded[4:]) <= {0, 1, 2}
    ran = np.arange(found.steps) != 1
    quiet = replace(found, computed=found.computed & ran[:, None], work=found.work * ran)
    assert quiet.passes == found.passes - 1
    assert quiet.computed_share == found.computed[[0, 2]].mean()


def test_slots_beyond_an_early_end_are_not_decoded(llada):
    whole = dkv.generate(llada, IDS, max_new_tokens=10, block_length=5)
    eos = int(whole.sequences[0, 4 + 1])
    found = trace.record(llada, Tokens(), IDS, max_new_tokens=[10], eos_token_id=eos, block_length=5)
    new = found.stats.new_tokens
    assert 0 < new < 10 and (found.decoded[4 : 4 + new] >= 0).all() and (found.decoded[4 + new :] == -1).all()
    assert sum(len(step["decoded"]) for step in found.to_dict()["steps"]) == new


def test_only_one_prompt_and_something_to_generate(llada):
    with pytest.raises(ValueError, match=r"input_ids must be \[1, P\], as a trace is of one prompt; got \[2, 4\]"):
        trace.record(llada, Tokens(), IDS.repeat(2, 1))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        trace.record(llada, Tokens(), IDS, max_new_tokens=0)


def test_the_arguments_of_a_record_are_those_of_generate(llada):
    expected = trace.record(llada, Tokens(), IDS, max_new_tokens=3).ids.tolist()
    ones = torch.ones_like(IDS)
    encoding = {"input_ids": IDS, "attention_mask": ones}
    assert trace.record(llada, Tokens(), encoding, max_length=7).ids.tolist() == expected
    with pytest.raises(ValueError, match="a trace is of one prompt; got padding"):
        trace.record(llada, Tokens(), {"input_ids": IDS, "attention_mask": ones * 0}, max_new_tokens=3)
    for wrong in (None, 5, "abc", [[1, 2]]):
        with pytest.raises(ValueError, match="input_ids must be a tensor"):
            trace.record(llada, Tokens(), wrong)
    for wrong in (5, "abc", {}):
        with pytest.raises(TypeError, match=r"generation_config must be a dkv.DiffusionConfig"):
            trace.record(llada, Tokens(), IDS, wrong)
        with pytest.raises(TypeError, match="tokenizer must be that of the model"):
            trace.record(llada, wrong, IDS)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        trace.record(llada, Tokens(), IDS, max_new_tokens=[0])


def test_the_settings_of_the_caller_are_left_alone(llada):
    config = dkv.DiffusionConfig(max_new_tokens=2)
    assert trace.record(llada, Tokens(), IDS, config, cache="prefill").policy == "PrefillCache()"
    assert not config.output_history and config.cache == dkv.NoCache()


def test_tokens_as_text():
    assert texts_of(Tokens(), [20, 62, 40, 41, 42, 5]) == [" w20", "<|end|>", "日", "", "", "\n"]
    assert texts_of(Tokens(), [40, 41, 20, 42]) == ["\ufffd", "\ufffd", " w20", "\ufffd"]
    assert texts_of(Tokens(), []) == []


def test_policies_are_written_as_in_python():
    assert label(dkv.DecodeCache(8)) == "DecodeCache(refresh=8)" and label(dkv.NoCache()) == "NoCache()"
    assert (
        label(dkv.PrefillDecodeCache(4, shift_rule="un_right"))
        == "PrefillDecodeCache(refresh=4, shift_rule='un_right')"
    )
    assert (
        label(dkv.GreedyCache(2, 0, window_center="last")) == "GreedyCache(refresh=2, window=0, window_center='last')"
    )
