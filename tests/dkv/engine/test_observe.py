"""How much slots were attended to, through all layers: against the product of whole matrices."""

import copy
from types import SimpleNamespace

import pytest
import torch

import dkv
from dkv.core.kv_cache import KVCache
from dkv.core.varlen import Segments
from dkv.engine.run import Run
from dkv.kernels import Workspace
from dkv.models.joining import join_
from dkv.models.packing import pack_


class Watched:
    """The rollout of every pass of a generation, from the model's own queries and keys and as whole matrices."""

    def __init__(self, model, monkeypatch):
        self.model, self.layers, step = model, [], model.step

        def watched(tokens, positions, buffer, *, observe, **how):
            self.buffer, self.layers = buffer, []

            def both(layer, query, *others):
                self.layers.append((layer, query))
                observe(layer, query, *others)

            return step(tokens, positions, buffer, observe=both, **how)

        monkeypatch.setattr(model, "step", watched)

    def whole(self, row, length, slots, first):
        """Column sums [length] of the rollout of a row that computed `slots`, whose entries begin at `first`."""
        group, rollout = self.model.spec.num_heads // self.model.spec.num_kv_heads, torch.eye(length).double()
        for layer, query in self.layers:
            key = self.buffer.layers[layer][0].numbers[row, :length].double().repeat_interleave(group, 1)
            scores = torch.einsum("nhd,shd->nhs", query[first : first + len(slots)].double(), key)
            attention = torch.eye(length).double()
            attention[slots] = (scores * self.model.spec.head_dim**-0.5).softmax(-1).mean(1)
            rollout = (attention + torch.eye(length)) / 2 @ rollout
        return rollout.sum(0)


@pytest.mark.parametrize("guided", [0.0, 1.5])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_importance_is_that_of_the_rollout(build, padded, monkeypatch, dtype, close, guided):
    model = build(num_layers=3, num_kv_heads=2).to(dtype)
    ids, mask = padded([[5, 9, 11], [7, 3, 20, 41, 8, 30, 2], [4]])
    config = dkv.DiffusionConfig(max_new_tokens=[5, 8, 2], cache=dkv.Rollout(0.3, 2, 3.0), cfg_scale=guided)
    watched, engine = Watched(model, monkeypatch), Run.after_prompts(model, ids, mask, config)[1].engine
    while engine.numbers:
        before, active = engine.watch.told.clone(), engine.next_plan.active.clone()
        engine.step()
        first = 0
        for row, length in enumerate(engine.rows.row_lengths):
            slots = active[row].nonzero().flatten()
            found = engine.watch.told[row, :length]
            if len(slots):
                expected = watched.whole(row, length, slots, first)
                torch.testing.assert_close(found.double(), expected, atol=close, rtol=0)
            first += len(slots)
    assert not torch.equal(before, engine.watch.told)


def turned(model, watched, row, length, slots, first, asking, before):
    """The cosines of what is watched, layer by layer, and what is to be watched next: (slot, attention by slot)."""
    group, cosines, after = model.spec.num_heads // model.spec.num_kv_heads, [], []
    known = [slot for slot in range(length) if slot not in asking.of[row]]
    for place, (layer, query) in enumerate(watched.layers):
        key = watched.buffer.layers[layer][0].numbers[row, :length].double().repeat_interleave(group, 1)
        scores = torch.einsum("nhd,shd->nhs", query[first : first + len(slots)].double(), key)
        attention = torch.zeros(length, length).double()
        attention[slots] = (scores * model.spec.head_dim**-0.5).softmax(-1).mean(1)
        now = asking.now[row]
        if before is not None and (both := [s for s in now if s in asking.before[row]]):
            slot, past = before[place]
            cosines.append(torch.cosine_similarity(attention[both, slot], past[both], dim=0).item())
        most = max(known, key=lambda slot: attention[now, slot].sum().item()) if known else 0
        after.append((most, attention[:, most].clone()))
    return cosines, after


def test_a_pass_is_full_after_attention_has_turned(build, padded, monkeypatch):
    """The trigger of `ElasticCache`, told with whole matrices."""
    model = build(num_layers=3, num_kv_heads=2).double()
    ids, mask = padded([[5, 9, 11], [7, 3, 20, 41, 8, 30, 2], [4]])
    policy = dkv.ElasticCache(3, 0.9)
    config = dkv.DiffusionConfig(max_new_tokens=[9, 12, 5], cache=policy, steps=9, threshold=0.3)
    watched, engine = Watched(model, monkeypatch), Run.after_prompts(model, ids, mask, config)[1].engine
    before, asking, full, seen = {}, SimpleNamespace(before={}), [True] * 3, set()
    while engine.numbers:
        rows, active = engine.rows, engine.next_plan.active.clone()
        asking.of = [row.nonzero().flatten().tolist() for row in rows.masked]
        leading = policy.leftmost(rows, rows.timetable.now())
        asking.now = [row.nonzero().flatten().tolist() for row in leading]
        working, fresh = list(engine.numbers), rows.fresh.clone()
        for row in working:
            expected = rows.everywhere[row] if full[row] else leading[row] | fresh[row]
            assert torch.equal(active[row], expected)
        engine.step()
        counts = active.sum(1)
        for row in working:
            slots = active[row].nonzero().flatten()
            where = (row, rows.row_lengths[row], slots, int(counts[:row].sum()))
            cosines, before[row] = turned(model, watched, *where, asking, before.get(row))
            full[row] = not full[row] and min(cosines, default=1) < policy.gamma
            seen.add(full[row])
        asking.before = dict(enumerate(asking.now))
    assert seen == {False, True}


@pytest.mark.parametrize("layers", [lambda model: model, join_, pack_], ids=["plain", "joined", "packed"])
def test_an_observed_pass_gives_the_same_hidden_states(model, layers):
    """Layer by layer all entries are asked, and those that need no output go no further in the last one."""
    model = layers(copy.deepcopy(model).requires_grad_(False))
    tokens, positions = torch.tensor([5, 9, 11, 7, 3]), torch.tensor([0, 1, 2, 0, 1])
    rows, starts = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 3])
    how = {
        "rows": rows, "segments": Segments(starts, torch.tensor([3, 2]), 3),
        "key_ranges": torch.tensor([[0, 3], [0, 2]]), "workspace": Workspace(),
    }  # fmt: skip
    some = {"outputs": torch.tensor([1, 3]), "output_segments": Segments(starts // 3, torch.tensor([1, 1]), 1)}
    seen, left = [], []
    expected = model.step(tokens, positions, KVCache(2, 3), **how, **some)
    model.layers[-1].register_forward_hook(lambda _, taken, given: left.append(len(given[0])))
    found = model.step(tokens, positions, KVCache(2, 3), **how, **some, observe=lambda *given: seen.append(given))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [layer for layer, *_ in seen] == [0, 1] and left == [2]
    # Attention has left its weights instead of the log-sum-exp.
    assert all(len(query) == 5 and lse is None and len(shares.rows) == 2 for _, query, lse, shares in seen)
