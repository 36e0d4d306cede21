"""Keys and values in 8 bits: rows as alone, memory, other turns, and what is refused."""

import functools

import pytest
import torch

import dkv
from dkv.core.kv_cache import KVCache, head_bytes
from dkv.kernels import rounded
from dkv.kernels.common import backend
from dkv.policies import POLICIES
from dkv.serving import memory
from tests.dkv.conftest import GOLDEN, pad_rows, small_model
from tests.dkv.engine.test_families_in_company import IN_BLOCKS, OPTIONS, check_rows, policy_call, prompts_of
from tests.dkv.engine.test_graphs import taped  # noqa: F401
from tests.kernels.sweeps import sweep

IDS = torch.tensor([[5, 9, 3, 8], [7, 2, 40, 11]])
INT8 = {"kv_cache_dtype": "int8"}
SETTINGS = [{"steps": 12}, {"threshold": 0.05, "temperature": 0.7}, {"cfg_scale": 0.5}]


def policy(name: str):
    return {"name": name, **OPTIONS.get(name, {})}


@pytest.mark.parametrize(("name", "settings"), sweep(sorted(POLICIES), SETTINGS, quick=2))
def test_rows_in_company_are_those_alone(model, name, settings):
    prompts = [[token % 60 for token in prompt] for prompt in prompts_of(3)]
    output = check_rows(model, prompts, **policy_call(name), **settings, **INT8)
    assert output.stats.settings["kv_cache_dtype"] == "int8"
    assert all(x.numbers.dtype == torch.int8 for pair in output.kv_cache.layers.values() for x in pair)


@pytest.mark.parametrize("folder", IN_BLOCKS)
@pytest.mark.parametrize("name", [pytest.param("none", marks=pytest.mark.slow), "decode", "dual"])
def test_rows_of_models_with_blocks(folder, name):
    model = dkv.load(GOLDEN / "families" / folder, device="cpu")
    check_rows(model, prompts_of(5), cache=policy(name), block_length=model.spec.block_length, steps=12, **INT8)


def test_a_pass_over_the_whole_text_stores_what_it_would_store_rounded(model):
    """In the first layer, where nothing has been attended to."""
    call = {"max_new_tokens": 6, "cache": dkv.NoCache(), "seed": 1}
    plain, found = dkv.generate(model, IDS, **call), dkv.generate(model, IDS, **call, **INT8)
    if torch.equal(plain.sequences, found.sequences):
        for x, y in zip(plain.kv_cache.layers[0], found.kv_cache.layers[0], strict=True):
            for part, exact in zip(y, rounded(x.numbers), strict=True):
                assert torch.equal(part[:, :10], exact[:, :10])


@pytest.mark.parametrize(
    ("size", "dtype", "most"), [(128, torch.bfloat16, 0.51), (64, torch.float16, 0.52), (32, torch.bfloat16, 0.532)]
)
def test_memory_by_count(size, dtype, most):
    like = torch.zeros(1, 2, size, dtype=dtype)
    held = {}
    for kind in ("auto", "int8"):
        cache = KVCache(3, 300, dtype=kind)
        cache.layer(0, like), cache.layer(1, like)
        held[kind] = cache.nbytes
        assert cache.nbytes == 2 * 2 * 3 * 384 * 2 * head_bytes(size, dtype, kind)
    assert held["int8"] == (size + 2) * held["auto"] // (2 * size)
    assert 0.5 < held["int8"] / held["auto"] < most


def test_a_slot_of_a_server_takes_as_much(llada, monkeypatch):
    spec = llada.spec
    a_slot = memory.slot_bytes(llada, "int8")
    assert a_slot == 2 * spec.num_layers * spec.num_kv_heads * (spec.head_dim + 2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * a_slot * 100)
    assert memory.slots_that_fit(llada, 32, "int8") == 96
    assert dkv.LLM(llada, max_length=32, **INT8).rows == 3 and dkv.LLM(llada, max_length=32).rows == 1


def test_requests_get_the_tokens_of_generate(llada):
    llm = dkv.LLM(llada, max_length=32, max_slots=64, cache=dkv.DecodeCache(4), **INT8)
    prompts = [[5, 9, 3], [7, 2], [4, 8, 30, 31]]
    found = llm.generate(prompts, max_new_tokens=9, seed=3, progress=False)
    assert llm._cache.kind[-1] == torch.int8
    for prompt, request in zip(prompts, found, strict=True):
        call = {"max_new_tokens": 9, "seed": 3, "cache": dkv.DecodeCache(4)}
        alone = dkv.generate(llada, torch.tensor([prompt]), **call, **INT8)
        assert request.tokens.tolist() == alone.sequences[0, len(prompt) :].tolist()
    with pytest.raises(ValueError, match="kv_cache_dtype must be 'int8', that of the buffer which requests share, got"):
        llm.add([5], kv_cache_dtype="auto")


@pytest.mark.parametrize("name", ["decode", "prefix", "dual", "rollout", "elastic", "skip"])
def test_the_next_turn_takes_them_over(model, name):
    call = {"max_new_tokens": 6, "cache": policy(name), "seed": 1, **INT8}
    first = dkv.generate(model, IDS, **call)
    prompts = torch.cat((first.sequences, torch.tensor([[20, 21, 22], [23, 24, 25]])), 1)
    before = [part.clone() for x in first.kv_cache.layers[0] for part in x]
    second = dkv.generate(model, prompts, **call, kv_cache=first.kv_cache)
    assert second.stats.reused_slots == int(first.kv_cache.seen.sum()) >= 2 * 5
    assert all(
        torch.equal(x, y) for x, y in zip([part for x in first.kv_cache.layers[0] for part in x], before, strict=True)
    )


def test_a_cache_of_another_dtype_is_refused(model):
    call = {"max_new_tokens": 4, "cache": dkv.DecodeCache(4)}
    first, rounded_first = dkv.generate(model, IDS, **call), dkv.generate(model, IDS, **call, **INT8)
    with pytest.raises(
        ValueError, match="of a call with kv_cache_dtype='auto', and this one has 'int8': give the same"
    ):
        dkv.generate(model, first.sequences, **call, **INT8, kv_cache=first.kv_cache)
    with pytest.raises(ValueError, match="of a call with kv_cache_dtype='int8', and this one has 'auto'"):
        dkv.generate(model, first.sequences, **call, kv_cache=rounded_first.kv_cache)
    with pytest.raises(ValueError, match="kv_cache is of another model: it has layers, heads, head size and dtype"):
        dkv.generate(small_model(num_layers=1), first.sequences, **call, **INT8, kv_cache=rounded_first.kv_cache)


def test_impossible_values_are_named():
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, int8, got 'int4'"):
        dkv.DiffusionConfig(kv_cache_dtype="int4")
    with pytest.raises(ValueError, match="dtype must be one of auto, int8, got 'fp8'"):
        KVCache(1, 4, dtype="fp8")


def test_growing_keeps_what_is_stored(monkeypatch):
    monkeypatch.setattr("dkv.core.kv_cache.SLOT_MULTIPLE", 8)
    cache = KVCache(1, 100, grows=True, dtype="int8")
    cache.reserve(7)
    key, _ = cache.layer(0, torch.ones(1, 2, 4))
    key.put_((torch.zeros(7, dtype=torch.int64), torch.arange(7)), torch.randn(7, 2, 4))
    before = key.plain(torch.float32)
    cache.reserve(60)
    key, value = cache.visible(0)
    assert key.shape == value.shape == (1, 63, 2, 4) and key.scales.shape == (1, 63, 2)
    assert torch.equal(key.plain(torch.float32)[:, :7], before[:, :7])
    assert torch.count_nonzero(key.plain(torch.float32)[:, 7:]) == 0


@pytest.mark.parametrize("name", sorted(backend.BACKENDS))
@pytest.mark.parametrize("place", ["k_proj", "v_proj"])
def test_nan_stays_told(place, name, build):
    model = build()
    getattr(model.layers[1], place).weight[3].fill_(torch.nan)
    with dkv.use_backend(name):
        for cache in (None, dkv.DecodeCache(4)):
            with pytest.raises(ValueError, match="check the weights"):
                dkv.generate(model, IDS, max_new_tokens=6, cache=cache, **INT8)


@pytest.mark.parametrize("name", [pytest.param("decode", marks=pytest.mark.slow), "dual", "elastic"])
def test_the_kernels_give_the_tokens_of_pytorch(dream, name):
    if not backend.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    ids, mask = pad_rows([[5, 9, 11], [7, 3, 21, 40, 2, 8]])
    found = {}
    for of in ("torch", "triton"):
        with dkv.use_backend(of):
            found[of] = dkv.generate(dream, ids, mask, max_new_tokens=5, block_length=3, cache=name, seed=1, **INT8)
    assert torch.equal(found["triton"].sequences, found["torch"].sequences)


@pytest.mark.parametrize("name", ["decode", "dual", "rollout", "elastic", "skip"])
def test_steps_are_replayed(llada, name, taped, monkeypatch):  # noqa: F811
    ids, mask = pad_rows([[5, 9, 3], [7, 2, 40, 11, 8]])
    call = {"max_new_tokens": 24, "cache": policy(name), "seed": 2, **INT8}
    replayed = dkv.generate(llada, ids, mask, **call)
    monkeypatch.setenv("DKV_GRAPHS", "0")
    plain = dkv.generate(llada, ids, mask, **call)
    assert replayed.stats.replayed_passes and not plain.stats.replayed_passes
    assert torch.equal(replayed.sequences, plain.sequences)
    # Another generation, with a cache of the model's dtype, has graphs of its own.
    auto = dkv.generate(llada, ids, mask, **{**call, "kv_cache_dtype": "auto"})
    assert auto.kv_cache.kind[-1] == torch.float32


def test_canvases_and_drafts_that_are_verified_have_it_too():
    gemma = dkv.load(GOLDEN / "families" / "diffusion_gemma" / "gemma_tiny", device="cpu")
    ids = torch.tensor([[5, 9, 3, 8]])
    call = functools.partial(dkv.generate, gemma, ids, max_new_tokens=8, seed=1)
    output = call(**INT8)
    assert output.sequences.shape == call().sequences.shape
    assert {x.numbers.dtype for pair in output.kv_cache.layers.values() for x in pair} == {torch.int8}
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, int8, got 'fp8'"):
        call(kv_cache_dtype="fp8")
    nemotron = dkv.load(GOLDEN / "families" / "nemotron" / "nemotron_tiny", device="cpu")
    (ids, mask), call = pad_rows(prompts_of(4)), {"max_new_tokens": 9, "schedule": "speculative", **INT8}
    drafted = dkv.generate(nemotron, ids, mask, **call)
    assert drafted.kv_cache.kind[-1] == torch.int8
    for row, prompt in enumerate(prompts_of(4)):
        alone = dkv.generate(nemotron, torch.tensor([prompt]), **call).sequences[0]
        assert torch.equal(drafted.sequences[row, ids.shape[1] - len(prompt) :], alone)
