"""Steps of block-causal models that are replayed, from tapes as in test_graphs."""

import pytest
import torch

import dkv
from dkv.core.sequences import MULTIPLES
from tests.dkv.conftest import pad_rows, small_model
from tests.dkv.engine.test_graphs import taped  # noqa: F401


@pytest.mark.parametrize("cache", ["none", "decode"])
def test_graphs_serve_the_next_generation(cache, taped, monkeypatch):  # noqa: F811
    monkeypatch.setitem(MULTIPLES, "cpu", 64)
    model, found = small_model(attention="block", block_length=8), []
    call = {"max_new_tokens": 12, "cache": cache, "seed": 3, "eos_token_id": []}
    prompts = [pad_rows(rows) for rows in ([[5, 9, 3, 8], [7, 2]], [[3], [1, 6, 9, 4, 4, 2, 1, 8, 7, 7]])]
    for ids, mask in prompts:
        output = dkv.generate(model, ids, mask, **call)
        assert output.stats.eager_reason is None and output.stats.replayed_passes
        # A graph writes where it was captured: all slots are there at once.
        assert output.kv_cache.room == output.kv_cache.length
        found.append(output.sequences)
        del output  # and its keys and values
    monkeypatch.setenv("DKV_GRAPHS", "0")
    for (ids, mask), sequences in zip(prompts, found, strict=True):
        assert torch.equal(sequences, dkv.generate(model, ids, mask, **call).sequences)
