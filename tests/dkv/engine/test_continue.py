"""The next turn of a chat: what an earlier generation has computed is not computed again."""

import pytest
import torch

import dkv

IDS = torch.tensor([[5, 9, 3, 8], [7, 2, 40, 11]])
POLICIES = [
    dkv.DecodeCache(4),
    dkv.PrefillCache(),
    dkv.PrefillDecodeCache(4),
    dkv.GreedyCache(4, 2),
    dkv.PrefixCache(),
    dkv.DualCache(),
    dkv.SuffixWindow(2),
    dkv.Rollout(0.3, 3, 4.0),
    dkv.ElasticCache(3, 0.99),
    dkv.SkipCache("1/2@0", block_every=3),
]


def turns(model, cache, **settings):
    """A first turn, and the prompts of a second one that go on from it."""
    first = dkv.generate(model, IDS, max_new_tokens=6, cache=cache, **settings)
    return first, torch.cat((first.sequences, torch.tensor([[20, 21, 22], [23, 24, 25]])), 1)


@pytest.mark.parametrize("cache", POLICIES, ids=str)
def test_the_shared_prefix_is_not_computed_again(model, cache):
    """All of the first turn but slots that were never computed as tokens: those decoded last, or settled too early."""
    first, prompts = turns(model, cache)
    call = {"max_new_tokens": 5, "cache": cache, "output_active": True}
    before = [x.numbers.clone() for x in first.kv_cache.layers[0]]
    output = dkv.generate(model, prompts, **call, kv_cache=first.kv_cache)
    computed, seen = output.active[0], first.kv_cache.seen
    assert output.stats.reused_slots == int(seen.sum()) >= 2 * 5
    assert torch.equal(computed[:, :10], ~seen) and computed[:, 10:].all()
    fresh = dkv.generate(model, prompts, **call)
    assert output.stats.computed_slots < fresh.stats.computed_slots
    assert output.stats.full_passes < fresh.stats.full_passes
    # The earlier buffer is as it was: other turns can follow it.
    assert all(torch.equal(x.numbers, y) for x, y in zip(first.kv_cache.layers[0], before, strict=True))


def test_reuse_ends_with_the_first_refresh(llada):
    """DecodeCache(4): passes 0 and 1 spare the prefix, 2 and 3 are cached, 4 recomputes everything."""
    first, prompts = turns(llada, dkv.DecodeCache(4))
    call = {"max_new_tokens": 6, "output_active": True, "kv_cache": first.kv_cache}
    whole = dkv.generate(llada, prompts, **call, cache=dkv.DecodeCache(4)).active[:, 0, :9].sum(1).tolist()
    assert whole[:2] == [9 - int(first.kv_cache.seen[0, :9].sum())] * 2 and whole[2:4] == [0, 0] and whole[4] == 9
    never = dkv.generate(llada, prompts, **call, cache=dkv.PrefillDecodeCache(2)).active[:, 0, :9].sum(1).tolist()
    assert sum(never[1:]) == 0


def test_keys_and_values_are_those_of_a_pass_over_the_same_text(llada):
    """Where nothing was stale to begin with, reuse changes nothing: the whole text once, and then again."""
    once = dkv.generate(llada, IDS, max_new_tokens=1, cache=dkv.PrefillCache())
    call = {"max_new_tokens": 1, "cache": dkv.PrefillCache(), "output_logits": True}
    again = dkv.generate(llada, IDS, **call, kv_cache=once.kv_cache)
    assert again.stats.reused_slots == 8 and again.stats.computed_slots == 2
    expected = dkv.generate(llada, IDS, **call)
    torch.testing.assert_close(again.logits[0][:, 4], expected.logits[0][:, 4], atol=1e-5, rtol=0)
    assert torch.equal(again.sequences, expected.sequences)


def test_a_text_that_went_another_way_is_reused_up_to_there(llada):
    first, prompts = turns(llada, dkv.PrefillCache())
    prompts[1, 2] = 59
    output = dkv.generate(
        llada,
        prompts,
        max_new_tokens=4,
        cache=dkv.PrefillCache(),
        kv_cache=first.kv_cache,
        output_active=True,
    )
    assert output.active[0, 1].tolist() == [False] * 2 + [True] * 15 and not output.active[0, 0, :8].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_rows_that_left_early(llada, padded, side):
    """Rows move in the buffer as others end; what is taken over is found by their first places."""
    rows, new = [[5, 9], [7, 3, 20, 41], [8]], [1, 6, 4]
    ids, mask = padded(rows, side)
    first = dkv.generate(llada, ids, mask, max_new_tokens=new, cache=dkv.DecodeCache(0))
    answers = [first.sequences[i, 4 : 4 + n].tolist() for i, n in enumerate(new)]
    texts = [row + answer + [30, 31] for row, answer in zip(rows, answers, strict=True)]
    ids, mask = padded(texts, side)
    call = {"max_new_tokens": 5, "cache": dkv.PrefillDecodeCache(3)}
    output = dkv.generate(llada, ids, mask, kv_cache=first.kv_cache, **call)
    for i, (row, n, text) in enumerate(zip(rows, new, texts, strict=True)):
        alone = dkv.generate(llada, torch.tensor([row]), max_new_tokens=n, cache=dkv.DecodeCache(0))
        again = dkv.generate(llada, torch.tensor([text]), kv_cache=alone.kv_cache, **call)
        assert torch.equal(output.sequences[i, -5:], again.sequences[0, -5:])


def test_an_end_is_not_reused_as_padding(llada):
    ids = IDS[:1]
    whole = dkv.generate(llada, ids, max_new_tokens=8)
    eos = int(whole.sequences[0, 6])
    first = dkv.generate(llada, ids, max_new_tokens=8, cache=dkv.DecodeCache(3), eos_token_id=eos, pad_token_id=0)
    end = 4 + first.stats.new_tokens
    assert not first.kv_cache.seen[0, end:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": dkv.NoCache()}, "kv_cache goes with a cache policy"),
        ({"cfg_scale": 1.0}, "kv_cache does not go with cfg_scale"),
        ({"rows": 1}, "kv_cache has 2 rows"),
        ({"kv_cache": dkv.KVCache(2, 8)}, "kv_cache must be the kv_cache of an output"),
        ({"kv_cache": "yes"}, "kv_cache must be the kv_cache of an output"),
    ],
    ids=["no cache", "guidance", "rows", "unused", "no cache object"],
)
def test_impossible_caches_are_named(llada, change, message):
    first, prompts = turns(llada, dkv.DecodeCache(4))
    rows = change.pop("rows", 2)
    call = {"max_new_tokens": 2, "cache": dkv.DecodeCache(4), "kv_cache": first.kv_cache, **change}
    with pytest.raises(ValueError, match=message):
        dkv.generate(llada, prompts[:rows], **call)


def test_a_cache_of_two_branches_is_refused(llada):
    first = dkv.generate(llada, IDS[:1], max_new_tokens=4, cache="decode", cfg_scale=1.0)
    with pytest.raises(ValueError, match="kv_cache does not go with cfg_scale"):
        dkv.generate(
            llada,
            first.sequences.repeat(2, 1),
            max_new_tokens=4,
            cache="prefill",
            kv_cache=first.kv_cache,
        )


def test_a_cache_of_another_model_is_refused(llada, dream):
    first, prompts = turns(llada, dkv.DecodeCache(4))
    with pytest.raises(ValueError, match="kv_cache is of another model"):
        dkv.generate(dream, prompts, max_new_tokens=2, cache=dkv.DecodeCache(4), kv_cache=first.kv_cache)
