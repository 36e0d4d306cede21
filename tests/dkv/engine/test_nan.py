"""Numbers that are not finite, in the model or its buffer, are an error on every backend, which says what to check."""

import pytest
import torch

import dkv
from dkv.kernels import BACKENDS, use_backend

PROMPT = torch.tensor([[5, 9, 3, 8]])
backends = pytest.mark.parametrize("backend", sorted(BACKENDS))
CACHES = [None, dkv.DecodeCache(4), dkv.GreedyCache(4, 2), dkv.DualCache(), dkv.SuffixWindow(0)]
POISONED = {
    "embedding of the prompt": lambda model: model.embed.weight[9].fill_(torch.nan),
    "key": lambda model: model.layers[0].k_proj.weight[0, 0].fill_(torch.nan),
    "value": lambda model: model.layers[1].v_proj.weight[3].fill_(torch.nan),
    "query": lambda model: model.layers[1].q_proj.weight[3].fill_(torch.nan),
    "head": lambda model: model.head.weight[7, 1].fill_(torch.nan),
    "infinity": lambda model: model.layers[0].k_proj.weight[0].fill_(torch.inf),
}


def fails(model, match: str, **settings) -> None:
    with pytest.raises(ValueError, match=match):
        dkv.generate(model, PROMPT, **{"max_new_tokens": 6, "block_length": 3, **settings})


@backends
@pytest.mark.parametrize("place", POISONED)
def test_nan_in_the_weights(place, backend, build):
    model = build()
    POISONED[place](model)
    with use_backend(backend):
        for cache in (None, dkv.DecodeCache(4)):
            fails(model, "check the weights", cache=cache)


@backends
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: str(cache)[:8])
def test_keys_that_overflow_in_float16(cache, backend, build):
    model = build().half()
    model.layers[0].k_proj.weight.mul_(30000.0)
    with use_backend(backend):
        fails(model, "float16 overflows where bfloat16 and float32 do not", cache=cache)


@backends
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_nan_in_the_buffer_of_an_earlier_turn(which, backend, build):
    """Slots that cached steps read and do not compute."""
    model = build()
    with use_backend(backend):
        first = dkv.generate(model, PROMPT, max_new_tokens=4, cache=dkv.DecodeCache(None))
        buffer = first.kv_cache
        buffer.layers[1][which].numbers[:, 1] = torch.nan
        more = torch.cat((first.sequences, torch.tensor([[7]])), 1)
        with pytest.raises(ValueError, match="logits hold NaN"):
            dkv.generate(model, more, max_new_tokens=4, cache=dkv.DecodeCache(None), kv_cache=buffer)


def test_rows_of_other_lengths_and_padding_are_not_touched(build, padded):
    """NaN in the embedding of what is only padding, or of another row's text, is no error, or that row's."""
    model = build()
    clean = dkv.generate(model, torch.tensor([[5, 3]]), max_new_tokens=4)
    model.embed.weight[0] = torch.nan
    ids, mask = padded([[5, 3], [7, 2, 8, 4]], pad=0)
    found = dkv.generate(model, ids, mask, max_new_tokens=4, vocab_limit=60)
    if (clean.sequences[0, 2:] != 0).all():
        assert torch.equal(found.sequences[0, 4:], clean.sequences[0, 2:])


def test_the_settings_that_may_be_the_cause_are_named_first(build):
    model = build().half()
    fails(model, r"check cfg_scale=60000.0, which multiplies them, then the weights", cfg_scale=6e4)
    fails(
        model, "check the logits_processor, which changes them, then the weights",
        logits_processor=lambda ids, scores: torch.full_like(scores, -torch.inf),
    )  # fmt: skip
