"""Steps of block-causal models that are replayed, from tapes as in test_graphs."""

import pytest
import torch

import dkv
from dkv.core.sequences import MULTIPLES
from tests.dkv.conftest import pad_rows, small_model
from tests.dkv.engine.test_graphs import taped  # noqa: F401

SETTINGS = [
    {},
    {"cache": "decode"},
    {"cache": "dual", "block_length": 4},
    {"cache": {"name": "dual", "delayed": True}, "block_length": 4},
    {"edit_threshold": 0.02, "threshold": 0.05, "post_steps": 3},
    {"edit_threshold": 0.0, "post_steps": 1, "eos_token_id": [3, 7, 11, 50]},
]
PROMPTS = [[[5, 9, 3, 8], [7, 2]], [[3], [1, 6, 9, 4, 4, 2, 1, 8, 7, 7]]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_graphs_serve_the_next_generation(settings, taped, monkeypatch):  # noqa: F811
    monkeypatch.setitem(MULTIPLES, "cpu", 64)
    model, found = small_model(attention="block", block_length=8), []
    call = {"max_new_tokens": 20, "seed": 3, "eos_token_id": [], **settings}
    prompts = [pad_rows(rows) for rows in PROMPTS]
    for ids, mask in prompts:
        before = taped.captured
        output = dkv.generate(model, ids, mask, **call)
        assert output.stats.eager_reason is None and output.stats.replayed_passes
        # A graph writes where it was captured: all slots are there at once.
        assert output.kv_cache.room == output.kv_cache.length
        found.append((output.sequences, taped.captured - before))
        del output  # and its keys and values
    assert found[0][1] > found[1][1] == 0
    monkeypatch.setenv("DKV_GRAPHS", "0")
    for (ids, mask), (sequences, _) in zip(prompts, found, strict=True):
        assert torch.equal(sequences, dkv.generate(model, ids, mask, **call).sequences)
