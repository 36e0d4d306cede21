"""Keys and values of block-causal models: their memory follows what was reached."""

import pytest
import torch

import dkv
from dkv.core.kv_cache import KVCache
from tests.dkv.conftest import pad_rows, small_model
from tests.dkv.engine.test_blocks import KINDS

PROMPTS = [[5, 9, 3, 8, 1, 44, 17], [7, 2, 4], [4, 4, 6, 12, 30, 31, 32, 33, 8]]
POLICIES = ["none", dkv.DecodeCache(None), {"name": "dual", "delayed": True}]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Buffers that grow by few slots."""
    monkeypatch.setattr("dkv.core.kv_cache.SLOT_MULTIPLE", 8)


@pytest.fixture(params=KINDS)
def model(request):
    return small_model(**{"attention": "block", "block_length": 4, **KINDS[request.param]})


def held(cache):
    """Slots of the buffer, and bytes of all layers."""
    (slots,) = {x.shape[1] for pair in cache.layers.values() for x in pair}
    assert slots == cache.slots
    return slots, cache.nbytes


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_tokens_are_those_of_a_whole_buffer(model, policy, monkeypatch):
    ids, mask = pad_rows(PROMPTS)
    call = {"max_new_tokens": [41, 30, 9], "cache": policy, "eos_token_id": [], "seed": 1}
    found = dkv.generate(model, ids, mask, **call)
    reserve = KVCache.reserve
    monkeypatch.setattr(KVCache, "reserve", lambda self, reach: reserve(self, self.length))
    whole = dkv.generate(model, ids, mask, **call)
    assert torch.equal(found.sequences, whole.sequences)
    assert found.kv_cache.length == whole.kv_cache.length and held(found.kv_cache) == held(whole.kv_cache)


def test_an_early_end_holds_what_was_reached_and_one_growth(model):
    ids, mask = pad_rows(PROMPTS)
    free = dkv.generate(model, ids, mask, max_new_tokens=40, eos_token_id=[])
    ends = free.sequences[:, ids.shape[1] + 30].unique().tolist()
    output = dkv.generate(model, ids, mask, max_new_tokens=200, eos_token_id=ends)
    reached = int(output.kv_cache.seen.sum(1).max()) + 4
    assert reached < 60 and output.kv_cache.length > 200
    slots, nbytes = held(output.kv_cache)
    assert slots <= reached * 5 // 4 + 2 * 8
    spec = model.spec
    assert nbytes == spec.num_layers * 2 * len(ids) * slots * spec.num_kv_heads * spec.head_dim * 4


def test_growth_is_a_quarter_at_least_and_ends_with_the_canvas():
    cache = KVCache(1, 100, grows=True)
    assert (cache.room, cache.slots) == (0, 0)
    found = []
    for reach in (7, 8, 60, 64, 95, 100):
        cache.reserve(reach)
        key, _ = cache.layer(0, torch.ones(1, 1, 2))
        found.append((cache.slots, cache.room))
        assert key.shape[1] == cache.slots and cache.room >= reach
        key.numbers[:, reach - 1] = reach
    assert found == [(8, 7), (16, 15), (64, 63), (80, 79), (104, 100), (104, 100)]
    assert key.numbers[0, [6, 7, 59, 63, 94, 99], 0, 0].tolist() == [7, 8, 60, 64, 95, 100]
    assert cache.visible(0)[0].shape[1] == 100
    assert cache.places(torch.tensor([3, 104])).tolist() == [3, 104]
    small = KVCache(1, 100, grows=True)
    small.reserve(7)
    assert small.places(torch.tensor([3, 100])).tolist() == [3, 7]


def test_a_chat_goes_on_in_a_buffer_that_grows(model):
    call = {"max_new_tokens": 21, "eos_token_id": []}
    texts, output = torch.tensor([PROMPTS[0]]), None
    for turn in range(3):
        fresh = dkv.generate(model, texts, **call)
        past = None if output is None else output.kv_cache
        output = dkv.generate(model, texts, **call, kv_cache=past)
        assert torch.equal(output.sequences, fresh.sequences)
        assert held(output.kv_cache)[0] <= output.kv_cache.length * 5 // 4 + 16
        texts = torch.cat((output.sequences, torch.tensor([[20 + turn, 21, 22]])), 1)


def test_a_buffer_without_passes_is_a_past_like_any_other():
    model = small_model(attention="block", block_length=4)
    ids = torch.tensor([PROMPTS[0]])
    empty = dkv.generate(model, ids, max_new_tokens=0).kv_cache
    output = dkv.generate(model, ids, max_new_tokens=9, kv_cache=empty)
    assert not empty.layers and output.stats.reused_slots == 0
    assert torch.equal(output.sequences, dkv.generate(model, ids, max_new_tokens=9).sequences)
