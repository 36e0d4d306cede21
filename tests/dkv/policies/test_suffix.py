"""A canvas that ends soon after the block: what is seen, what it costs, and that it is a shorter canvas indeed."""

import pytest
import torch

import dkv
from dkv.core.kv_cache import KVCache
from dkv.core.sequences import outside
from dkv.engine.config import DiffusionConfig
from dkv.engine.engine import Engine
from dkv.engine.records import visible
from dkv.engine.replay import replay
from dkv.kernels import use_backend

MASK = 63
IDS = torch.tensor([[5, 9, 3, 8], [7, 2, 40, 11]])
BASES = {"prefix": dkv.PrefixCache(), "dual": dkv.DualCache()}


def sets(model, ids, **settings):
    """The slots that every step computes, and those that it may see: bool [steps, B, L]."""
    computed, seen = [], []

    def watch(engine, result):
        computed.append(engine.rows.to_caller(result.plan.active))
        seen.append(visible(engine, result))

    output = replay(model, ids, on_step=watch, **settings)
    return torch.stack(computed), torch.stack(seen), output


def slots(row):
    return row.nonzero().flatten().tolist()


def test_gaps_as_masks():
    found = outside(torch.tensor([[1, 3], [2, 2], [0, 5], [5, 5]]), 5)
    assert found.int().tolist() == [[1, 0, 0, 1, 1], [1] * 5, [0] * 5, [1] * 5]


@pytest.mark.parametrize("base", BASES)
def test_what_is_computed_and_seen(llada, dream, base):
    """4 slots of a prompt, 12 to fill in blocks of 3, a window of 2 and a tail of 1."""
    call = {"max_new_tokens": 12, "block_length": 3, "cache": dkv.SuffixWindow(2, 1, base)}
    for model, source in ((llada, 0), (dream, 1)):
        computed, seen, output = sets(model, IDS[:1], **call)
        block = [[*range(9), 15], [*range(12), 15], [*range(16)], [*range(16)]]
        assert [slots(row) for row in seen[::3, 0]] == [slots(row) for row in computed[::3, 0]] == block
        for step, row in enumerate(computed[:, 0]):
            first, stop = 4 + step // 3 * 3, 7 + step // 3 * 3
            if step % 3:
                cached = [slot for slot in block[step // 3] if first - source <= slot]
                assert slots(row) == [slot for slot in cached if base == "prefix" or slot < stop]
        stats = output.stats
        assert stats.full_passes == 4 and stats.total_slots == 12 * 16 and stats.computed_slots == int(computed.sum())


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.4}, {"cfg_scale": 1.5}, {"steps": 8}], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_each_block_is_filled_as_on_a_shorter_canvas(model, base, settings):
    """Without a tail: the first block of a generation that has the text so far for a prompt, and few slots ahead."""
    call, window = {"block_length": 4, "schedule": "blocks", **settings}, 3
    found = dkv.generate(model, IDS, max_new_tokens=16, cache=dkv.SuffixWindow(window, 0, base), **call).sequences
    for stop in (4, 8, 12, 16):
        text, new = found[:, :stop], min(4 + window, 20 - stop)
        steps = {"steps": 4} if "steps" in settings and new > 4 else {"steps": 2} if "steps" in settings else {}
        if "cfg_scale" in settings and stop > 4:
            continue  # the text so far would be hidden from the branch without a prompt
        alone = dkv.generate(model, text, max_new_tokens=new, cache=BASES[base], **{**call, **steps})
        assert torch.equal(alone.sequences[:, : stop + 4], found[:, : stop + 4])


def test_a_window_that_reaches_the_end_is_the_base(model):
    call = {"max_new_tokens": 12, "block_length": 4, "schedule": "blocks"}
    for base, policy in BASES.items():
        expected = dkv.generate(model, IDS, cache=policy, **call)
        for window, tail in ((8, 0), (7, 1), (100, 1), (0, 8)):
            found = dkv.generate(model, IDS, cache=dkv.SuffixWindow(window, tail, base), **call)
            assert torch.equal(found.sequences, expected.sequences)
            assert found.stats.computed_slots == expected.stats.computed_slots
            assert found.stats.full_passes == expected.stats.full_passes == 3


@pytest.mark.parametrize("backend", ["torch", "reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_what_is_not_seen_is_never_read(model, backend, padded, monkeypatch):
    """Keys and values that no pass has written are NaN."""
    layer = KVCache.layer

    def poisoned(self, index, like):
        new = index not in self.layers
        pair = layer(self, index, like)
        for kept in pair if new else ():
            kept.numbers.fill_(torch.nan)
        return pair

    ids, mask = padded([[5, 9, 3, 8], [7], [40, 11]])
    call = {"max_new_tokens": [12, 9, 0], "block_length": 3}
    kinds = [
        ("blocks", dkv.SuffixWindow(2)),
        ("blocks", dkv.SuffixWindow(2, 1, "dual")),
        ("sliding", dkv.SuffixWindow(2)),
    ]
    calls = [{**call, "schedule": schedule, "cache": cache} for schedule, cache in kinds]
    expected = [dkv.generate(model, ids, mask, **call).sequences for call in calls]
    monkeypatch.setattr(KVCache, "layer", poisoned)
    with use_backend(backend):
        for call, sequences in zip(calls, expected, strict=True):
            assert torch.equal(dkv.generate(model, ids, mask, **call).sequences, sequences)


def test_drafts_lead_to_the_same_tokens(llada):
    call = {"max_new_tokens": 12, "block_length": 3, "threshold": 0.3, "threshold_decay": 0.5}
    *drafts, last = dkv.stream(llada, IDS, cache=dkv.SuffixWindow(2), **call)
    assert torch.equal(last.sequences, dkv.generate(llada, IDS, cache=dkv.SuffixWindow(2), **call).sequences)
    assert all((draft.sequences == MASK).any() for draft in drafts)


def test_rows_are_in_blocks_and_windows_of_their_own(llada):
    call = {"max_new_tokens": 12, "block_length": 3, "threshold": 0.25, "cache": dkv.SuffixWindow(2)}
    both = sets(llada, IDS, **call)
    for row in range(2):
        alone = sets(llada, IDS[row : row + 1], **call)
        for found, expected in zip(both[:2], alone[:2], strict=True):
            assert torch.equal(found[: len(expected), row], expected[:, 0])
    assert len({len(slots(row)) for row in both[1].flatten(0, 1)}) > 2


def test_given_text_in_the_gap_is_hidden_until_the_window_comes_near(model):
    """Masks at 0, 1, 4, 5, 8, 9 and 12, two of them a block: the window counts slots, the text at the end is seen."""
    text = torch.tensor([[MASK, MASK, 5, 9, MASK, MASK, 3, 8, MASK, MASK, 7, 2, MASK, 40, 11]])
    seen = []
    run = dkv.engine.run.Run
    rows = dkv.core.sequences.Sequences(text, torch.ones_like(text).bool(), text == MASK, MASK)
    config = DiffusionConfig(max_new_tokens=0, block_length=2, schedule="blocks", cache=dkv.SuffixWindow(3))
    one = run(model, rows, config, MASK, ends=False, on_step=lambda *of: seen.append(visible(*of)))
    with torch.no_grad():
        output = one.to_the_end(None, text, new=0)
    gaps = [slots(~row[0]) for row in seen]
    assert gaps == [[5, 6, 7, 8, 9, 10, 11]] * 2 + [[9, 10, 11]] * 2 + [[]] * 3
    call = {"block_length": 2, "schedule": "blocks", "cache": dkv.SuffixWindow(3)}
    assert torch.equal(dkv.infill(model, text, **call).sequences, output.sequences)


def test_reuse_and_what_was_never_computed(llada):
    """The next turn takes over what was computed as tokens, and no slot that was hidden from first to last."""
    cache, call = dkv.SuffixWindow(2), {"block_length": 3}
    first = dkv.generate(llada, IDS[:1], max_new_tokens=12, cache=cache, eos_token_id=list(range(62)), **call)
    computed = sets(llada, IDS[:1], max_new_tokens=12, cache=cache, eos_token_id=list(range(62)), **call)[0]
    assert not (first.kv_cache.seen & ~computed.any(0)).any() and not computed.any(0).all()
    whole = dkv.generate(llada, IDS[:1], max_new_tokens=12, cache=cache, **call)
    more = torch.cat((whole.sequences, torch.tensor([[20, 21]])), 1)
    call |= {"max_new_tokens": 12, "cache": cache}
    again = dkv.generate(llada, more, kv_cache=whole.kv_cache, output_active=True, **call)
    assert again.stats.reused_slots == int(whole.kv_cache.seen.sum()) > 8
    assert torch.equal(again.active[0, 0, :16], ~whole.kv_cache.seen[0])
    assert slots(again.active[0, 0, 18:]) == [0, 1, 2, 3, 4, 11]


def test_a_window_slides_with_the_region(model):
    """Blocks of 4 that slide: the gap begins 2 slots behind the region, and what comes in sight is computed."""
    call = {"max_new_tokens": 16, "block_length": 4, "schedule": "sliding", "cache": dkv.SuffixWindow(2)}
    computed, seen, _ = sets(model, IDS[:1], **call)
    assert [slots(~row[0])[:1] for row in seen] == [[10 + step] for step in range(9)] + [[]] * 7
    fresh = seen & ~torch.cat((torch.zeros_like(seen[:1]), seen[:-1]))
    assert fresh[1:].any() and not (fresh & ~computed).any()
    with pytest.raises(ValueError, match=r"cache SuffixWindow\(.*base='dual'\) goes by blocks, which do not slide"):
        dkv.generate(model, IDS, **call | {"cache": dkv.SuffixWindow(2, base="dual")})


def test_the_time_schedule_has_one_block_and_nothing_behind_it(dream):
    call = {"max_new_tokens": 8, "schedule": "time"}
    found = dkv.generate(dream, IDS, cache=dkv.SuffixWindow(0, 0), **call)
    expected = dkv.generate(dream, IDS, cache=dkv.PrefixCache(), **call)
    assert torch.equal(found.sequences, expected.sequences) and found.stats.full_passes == 1


def bounds(model, ids, **settings):
    """A generation, and the bound [B] of every step."""
    found = []

    def watch(engine, result):
        found.append(None if result.plan.bound is None else result.plan.bound.clone())

    return replay(model, ids, on_step=watch, **settings), found


@pytest.mark.parametrize(
    ("cache", "ahead"),
    [(None, [12, 9, 6, 3]), (dkv.SuffixWindow(2), [6, 6, 6, 3]), (dkv.DecodeCache(2), [12, 9, 6, 3])],
)
def test_a_threshold_that_falls(llada, cache, ahead):
    """Of 3 slots a block that none is sure of: r is the share of masks from the block on, of what is seen."""
    call = {"max_new_tokens": 12, "block_length": 3, "cache": cache, "threshold": 0.9999}
    plain, none = bounds(llada, IDS[:1], **call)
    output, found = bounds(llada, IDS[:1], **call, threshold_decay=0.5)
    assert none == [None] * 12 and output.stats.passes == 12
    for step, bound in enumerate(found):
        share = 1 if step % 3 == 0 else 1 - step % 3 / ahead[step // 3]
        assert bound.exp().item() == pytest.approx(0.9999 * (1 - 0.5 * (1 - share)), rel=1e-5)
    assert torch.equal(output.sequences, plain.sequences)


def test_a_threshold_that_falls_fills_more_at_once(model):
    call = {"max_new_tokens": 24, "block_length": 12, "threshold": 0.5, "schedule": "blocks"}
    passes = [dkv.generate(model, IDS, **call, threshold_decay=decay).stats.passes for decay in (0.0, 0.9)]
    assert passes[1] < passes[0]
    # Of an entropy its exponential falls: from step to step as that of a probability.
    call |= {"confidence": "entropy", "threshold": -0.7}
    _, found = bounds(model, IDS, **call, threshold_decay=0.5)
    assert found[0].tolist() == pytest.approx([-0.7, -0.7]) and found[1].max() < -0.7


def test_the_same_threshold_for_planned_slots(llada):
    """A policy that plans counts what it remembers by the bound of its row."""
    call = {"max_new_tokens": 16, "threshold": 0.3, "cache": dkv.GreedyCache(0, 2)}
    passes = [dkv.generate(llada, IDS[:1], **call, threshold_decay=decay).stats.passes for decay in (0.0, 0.5)]
    assert passes[1] < passes[0] < 16


def test_no_gap_is_no_work(llada):
    """What has no gap and no falling threshold has no further field in its plan, and reports five lines."""
    plans = []

    def watch(engine: Engine, result):
        plans.append(result.plan)

    replay(llada, IDS, on_step=watch, max_new_tokens=4, cache="prefix", threshold=0.5)
    assert all(plan.hidden is None and plan.bound is None and len(plan.report) == 5 for plan in plans)
