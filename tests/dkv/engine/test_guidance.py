"""Guidance: two branches, each with its own keys and values."""

import pytest
import torch

import dkv

IDS = torch.tensor([[5, 9, 3, 8], [7, 2, 40, 11]])
POLICIES = [
    dkv.NoCache(),
    dkv.DecodeCache(3),
    dkv.PrefillCache(),
    dkv.PrefillDecodeCache(3),
    dkv.GreedyCache(3, 2),
    dkv.PrefixCache(),
    dkv.DualCache(),
    dkv.SuffixWindow(2),
    dkv.Rollout(0.3, 3, 4.0),
    dkv.ElasticCache(3, 0.99),
]


def test_C14_the_first_step_is_that_of_two_plain_passes(model):
    """LLaDA's rule: l + s (l - l'), l' with all that was given masked."""
    output = dkv.generate(model, IDS, max_new_tokens=4, cfg_scale=1.5, output_logits=True)
    canvas = torch.cat((IDS, torch.full((2, 4), 63)), 1)
    with_, without = model(canvas), model(torch.full_like(canvas, 63))
    torch.testing.assert_close(output.logits[0], with_ + 1.5 * (with_ - without), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "cache", [dkv.DecodeCache(1), dkv.GreedyCache(1, 2), dkv.PrefixCache(), dkv.SuffixWindow(6)], ids=str
)
def test_C14_a_cache_that_keeps_nothing_changes_nothing(model, cache):
    call = {"max_new_tokens": 6, "cfg_scale": 1.5, "output_logits": True, "block_length": 1}
    expected, output = dkv.generate(model, IDS, **call), dkv.generate(model, IDS, **call, cache=cache)
    assert torch.equal(output.sequences, expected.sequences)
    for found, plain in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", POLICIES, ids=str)
def test_C14_the_two_caches_never_mix(model, cache):
    """Another prompt does not move a value of the branch that cannot see it; the branch with it is moved."""

    def buffers(ids):
        output = dkv.generate(model, ids, max_new_tokens=1, cfg_scale=1.5, cache=cache)
        return [x.numbers for layer in range(2) for x in output.kv_cache.layers[layer]]

    for one, other in zip(buffers(IDS), buffers(IDS.flip(0)), strict=True):
        assert torch.equal(one[2:, :5], other[2:, :5]) and not torch.equal(one[:2, :5], other[:2, :5])
        assert torch.equal(one[0, :5], other[1, :5])


def test_C14_no_guidance_costs_nothing(model):
    call = {"max_new_tokens": 6, "cache": dkv.DecodeCache(3)}
    plain, none = dkv.generate(model, IDS, **call), dkv.generate(model, IDS, **call, cfg_scale=0)
    guided = dkv.generate(model, IDS, **call, cfg_scale=0.5)
    assert torch.equal(plain.sequences, none.sequences)
    assert guided.stats.computed_slots == 2 * none.stats.computed_slots
    assert none.kv_cache.batch == 2 and guided.kv_cache.batch == 4


def test_guidance_follows_the_prompt(model):
    """Without a prompt both branches are one, and any scale gives the same."""
    empty, call = torch.zeros(2, 0, dtype=torch.long), {"max_new_tokens": 6}
    expected = dkv.generate(model, empty, **call).sequences
    assert torch.equal(dkv.generate(model, empty, **call, cfg_scale=3.0).sequences, expected)
    one, two = (dkv.generate(model, IDS, **call, cfg_scale=s).sequences for s in (0.0, 4.0))
    assert not torch.equal(one, two)
