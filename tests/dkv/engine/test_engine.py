"""The shapes of passes: few of them, and nothing in a result that depends on how they are filled up."""

import pytest
import torch

import dkv
from dkv.core.varlen import Padding
from dkv.engine import engine

POLICIES = [dkv.NoCache(), dkv.DecodeCache(4), dkv.PrefillCache(), dkv.PrefillDecodeCache(4), dkv.GreedyCache(4, 3)]


def test_passes_come_in_few_shapes(stub):
    model = stub(lambda call, positions: torch.randn(*positions.shape, 64))
    stats = dkv.generate(model, torch.arange(1, 12)[None], max_new_tokens=16, cache=dkv.DecodeCache(None), seed=0).stats
    assert model.calls == [27, 27, 16, 16, 16, 12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4]
    # The masked slots and the one decoded last.
    assert stats.computed_slots == 27 + 27 + sum(range(2, 16))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("settings", [{}, {"steps": 7}, {"temperature": 0.7}, {"confidence": "random"}], ids=str)
def test_what_fills_a_pass_changes_nothing(model, policy, settings, monkeypatch):
    ids, mask = torch.tensor([[5, 9, 3, 8], [7, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    call = {"attention_mask": mask, "max_new_tokens": 13, "cache": policy, "seed": 3, **settings}
    found = dkv.generate(model, ids, **call)
    for padding in (Padding(1), engine.GRAPHED):
        monkeypatch.setitem(engine.PADDINGS, "cpu", padding)
        other = dkv.generate(model, ids, **call)
        assert torch.equal(found.sequences, other.sequences)
        assert found.stats.computed_slots == other.stats.computed_slots
