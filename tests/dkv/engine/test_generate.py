"""`dkv.generate` on small models: rows, padding, schedules, recording, and what users reported."""

import threading

import pytest
import torch

import dkv
from dkv.tools.verify import replay

CACHES = [
    dkv.NoCache(),
    dkv.DecodeCache(3),
    dkv.DecodeCache(4, shift_rule="un_right"),
    dkv.PrefillCache(),
    dkv.PrefillDecodeCache(3),
    dkv.GreedyCache(3, 2),
    dkv.GreedyCache(4, 3, window_center="last"),
]
ROWS = [[5, 9, 11], [7, 3, 20, 41], [8, 30, 2, 2, 19, 4, 50], [1, 2, 3, 4, 5, 6, 7]]
RULES = ["probability", "margin", "entropy", "random"]


def new_tokens(output, width):
    return output.sequences[:, width:]


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_B05_same_tokens_alone_and_in_company(model, padded, cache):
    """Lengths 3, 4, 7, 7: batch 1, 2 and 4, and shuffled, padded on either side; greedy and sampled."""
    for settings in ({}, {"temperature": 0.9, "seed": 1}, {"confidence": "random", "seed": 2}):
        call = {"max_new_tokens": 6, "cache": cache, **settings}
        alone = [new_tokens(dkv.generate(model, torch.tensor([row]), **call), len(row))[0] for row in ROWS]
        for order, side in (([0, 1], "left"), ([0, 1, 2, 3], "right"), ([3, 1, 0, 2], "left")):
            ids, mask = padded([ROWS[i] for i in order], side)
            output = dkv.generate(model, ids, mask, **call)
            assert torch.equal(output.sequences[:, : ids.shape[1]], ids)
            assert torch.equal(new_tokens(output, ids.shape[1]), torch.stack([alone[i] for i in order]))


def test_B02_B04_padding_does_not_move_positions(model, padded):
    ids, mask = padded([[5, 9], [7, 3, 20, 41, 2]])
    extra, wider = torch.zeros(2, 3, dtype=torch.long), torch.cat((torch.zeros(2, 3, dtype=torch.long), mask), 1)
    call = {"max_new_tokens": 4, "output_logits": True}
    alone = dkv.generate(model, torch.tensor([[5, 9]]), **call)
    output = dkv.generate(model, ids, mask, **call)
    more = dkv.generate(model, torch.cat((extra, ids), 1), wider, **call)
    assert torch.equal(new_tokens(output, 5)[:1], new_tokens(alone, 2))
    assert torch.equal(new_tokens(more, 8), new_tokens(output, 5))
    torch.testing.assert_close(output.logits[-1][0, 3:], alone.logits[-1][0], atol=1e-4, rtol=0)
    assert not output.logits[0].isnan().any()


@pytest.mark.parametrize("pad", [1, 31, 32, 33])
def test_B17_empty_prompt_and_left_padding_in_bfloat16(build, pad):
    for shifted in (False, True):
        model = build(shifted=shifted).to(torch.bfloat16)
        ids = torch.full((2, pad + 2), 5)
        mask = torch.zeros_like(ids)
        mask[1, pad:] = 1
        output = dkv.generate(model, ids, mask, max_new_tokens=3, output_logits=True)
        assert all(step.isfinite().all() for step in output.logits)
        alone = dkv.generate(model, ids[1:, pad:], max_new_tokens=3)
        assert torch.equal(new_tokens(output, pad + 2)[1], new_tokens(alone, 2)[0])
        same = dkv.generate(model, ids[1:, pad:], torch.ones(1, 2, dtype=torch.long), max_new_tokens=3)
        assert torch.equal(same.sequences, alone.sequences)


def test_B08_slots_beyond_the_request_do_not_exist(llada):
    """gen 5 in blocks of 4: the canvas has 5 slots, and the first pass sees what a plain forward of 5 sees."""
    ids = torch.tensor([[5, 9, 3]])
    output = dkv.generate(llada, ids, max_new_tokens=5, block_length=4, output_logits=True)
    assert output.sequences.shape == (1, 8)
    canvas = torch.cat((ids, torch.full((1, 5), 63)), 1)
    torch.testing.assert_close(output.logits[0], llada(canvas), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_no_mask_is_left_and_prompts_stay(model, cache, rule):
    ids = torch.tensor([[5, 63, 7, 1], [4, 4, 63, 63]])
    for steps in (1, 3, 7, 20):
        output = dkv.generate(model, ids, max_new_tokens=7, steps=steps, cache=cache, confidence=rule, seed=0)
        assert torch.equal(output.sequences[:, :4], ids)
        assert not (new_tokens(output, 4) == 63).any()


def test_S03_mask_in_the_prompt_is_an_ordinary_token(llada):
    output = dkv.generate(llada, torch.tensor([[5, 63, 7]]), max_new_tokens=4, block_length=4, steps=4)
    assert output.sequences[0, :3].tolist() == [5, 63, 7] and not (output.sequences[0, 3:] == 63).any()


def test_S01_counts_are_per_row(llada, padded):
    """A row with fewer masks than its neighbour keeps its tokens: here a prompt that ends in masks of its own."""
    ids, mask = padded([[1, 2, 3, 4], [5, 6]], "right")
    output = dkv.generate(llada, ids, mask, max_new_tokens=3, steps=1)
    assert torch.equal(output.sequences[:, :4], ids) and not (new_tokens(output, 4) == 63).any()


@pytest.mark.parametrize("cache", ["none", dkv.DecodeCache(4), dkv.GreedyCache(4)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_B19_the_mask_is_never_emitted(stub, cache, temperature):
    def script(call, positions):
        logits = torch.full((*positions.shape, 64), -30.0)
        logits[..., 63], logits[..., 7] = 30.0, 20.0
        return logits

    for shifted in (False, True):
        model = stub(script, shifted=shifted)
        output = dkv.generate(model, torch.tensor([[1, 2]]), max_new_tokens=8, cache=cache, temperature=temperature)
        assert output.sequences[0, 2:].tolist() == [7] * 8 and len(model.calls) == output.stats.passes == 8


def test_B22_ids_beyond_the_limit_are_never_emitted(stub):
    def script(call, positions):
        logits = torch.zeros(*positions.shape, 72)
        logits[..., 70], logits[..., 11] = 9.0, 5.0
        return logits

    ids = torch.tensor([[1]])
    assert new_tokens(dkv.generate(stub(script, 72), ids, max_new_tokens=3, vocab_limit=64), 1).tolist() == [[11] * 3]
    assert new_tokens(dkv.generate(stub(script, 72), ids, max_new_tokens=3), 1).tolist() == [[70] * 3]


def test_C05_only_slots_of_the_block_are_decoded(stub):
    """The surest slots are always in the second block: still the first is filled first, and nothing stays."""

    def script(call, positions):
        logits = torch.zeros(*positions.shape, 64)
        logits[..., 7] = positions.float()
        return logits

    output = dkv.generate(
        stub(script), torch.tensor([[1, 2]]), max_new_tokens=8, block_length=4, steps=8, output_history=True
    )
    for step in range(4):
        row = output.history[step, 0, 2:]
        assert (row[:4] != 63).sum() == step + 1 and (row[4:] == 63).all()
    assert not (output.sequences == 63).any()


def test_C04_more_steps_than_slots_change_nothing(llada):
    ids = torch.tensor([[5, 9, 3]])
    few = dkv.generate(llada, ids, max_new_tokens=4, steps=4)
    many = dkv.generate(llada, ids, max_new_tokens=4, steps=10)
    assert torch.equal(few.sequences, many.sequences) and many.stats.passes == 4


def test_C09_nothing_to_do_and_nothing_to_start_from(model):
    ids = torch.tensor([[5, 9, 3]])
    assert torch.equal(dkv.generate(model, ids, max_new_tokens=0).sequences, ids)
    empty = dkv.generate(model, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)
    assert empty.sequences.shape == (1, 3) and not (empty.sequences == 63).any()


@pytest.mark.parametrize("position", [2, 5, 6])
def test_C10_shifted_slots_read_their_left_neighbour(dream, position):
    """The token of a slot is the best id of the plain forward's logits one slot to the left."""
    ids = torch.arange(1, position + 1).unsqueeze(0)
    output = dkv.generate(dream, ids, max_new_tokens=1)
    logits = dream(torch.cat((ids, torch.tensor([[63]])), 1))[0, position - 1]
    logits[63] = -torch.inf
    assert output.sequences[0, position] == logits.argmax()


def test_C11_the_cache_computes_fewer_slots(model):
    ids = torch.randint(1, 60, (1, 32), generator=torch.Generator().manual_seed(0))
    call = {"max_new_tokens": 32, "steps": 32}
    plain = dkv.generate(model, ids, **call)
    cached = dkv.generate(model, ids, **call, cache=dkv.DecodeCache(4))
    assert cached.stats.computed_slots < 0.75 * plain.stats.computed_slots == 0.75 * plain.stats.total_slots


def test_C13_stats_count_full_and_cached_passes(llada):
    ids = torch.tensor([[5, 9, 3]])
    stats = dkv.generate(llada, ids, max_new_tokens=8, cache=dkv.DecodeCache(4)).stats
    assert (stats.passes, stats.full_passes, stats.cached_passes) == (8, 3, 5)
    stats = dkv.generate(llada, ids, max_new_tokens=8, block_length=1, cache=dkv.DecodeCache(4)).stats
    assert (stats.passes, stats.cached_passes) == (8, 0)
    assert stats.tokens_per_forward == 1 and stats.new_tokens == 8 and stats.seconds > 0


def test_C15_runs_can_be_repeated(model):
    ids = torch.tensor([[5, 9, 3]])
    call = {"max_new_tokens": 6, "temperature": 1.0, "cache": dkv.DecodeCache(3)}
    first, second = (dkv.generate(model, ids, **call, seed=3) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    a, b = (dkv.generate(model, ids, **call, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.sequences, b.sequences) and a.stats.seed == b.stats.seed
    again = dkv.generate(model, ids, **call, seed=a.stats.seed)
    assert torch.equal(a.sequences, again.sequences)
    assert any(
        not torch.equal(first.sequences, dkv.generate(model, ids, **call, seed=s).sequences) for s in range(4, 9)
    )
    record = first.stats.settings
    assert record["cache"]["refresh"] == 3 and record["torch"] and record["dtype"] == "torch.float32"


def test_equal_prompts_are_sampled_apart_unless_their_seeds_are_equal(llada):
    ids, call = torch.tensor([[5, 9]] * 4), {"max_new_tokens": 8, "temperature": 1.5}
    for settings in ({}, {"seed": [1, 2, 3, 4]}):
        output = dkv.generate(llada, ids, **call, **settings)
        assert len({tuple(row) for row in output.sequences.tolist()}) > 1
        again = dkv.generate(llada, ids, **call, seed=output.stats.seed)
        assert torch.equal(again.sequences, output.sequences)
    alike = dkv.generate(llada, ids, **call, seed=0).sequences
    assert torch.equal(alike, dkv.generate(llada, ids[:1], **call, seed=0).sequences.expand(4, -1))


@pytest.mark.parametrize("cache", [dkv.DecodeCache(1), dkv.GreedyCache(1, 2), dkv.PrefillDecodeCache(1)], ids=str)
def test_S06_refresh_1(model, cache):
    ids = torch.tensor([[5, 9, 3, 8]])
    call = {"max_new_tokens": 6, "confidence": "random", "seed": 4}
    twin = dkv.PrefillCache() if isinstance(cache, dkv.PrefillDecodeCache) else dkv.NoCache()
    # Greedy draws an order once a block, others in every step: here it is the same one.
    order = torch.rand(1, 10, generator=torch.Generator().manual_seed(0))
    numbers = (lambda step, shape: order) if isinstance(cache, dkv.GreedyCache) else None
    found, expected = (replay(model, ids, None, numbers, **call, cache=policy) for policy in (cache, twin))
    assert torch.equal(found.sequences, expected.sequences)


def test_numbers_are_used_and_checked(llada):
    ids = torch.tensor([[5, 9]])
    order = [0.9, 0.1, 0.8, 0.3, 0.7, 0.5]
    call = {"max_new_tokens": 4, "confidence": "random", "output_history": True}
    output = replay(llada, ids, None, lambda step, shape: torch.tensor([order]), **call)
    decoded = [int((row[0, 2:] != 63).sum()) for row in output.history]
    assert decoded == [1, 2, 3, 4] and output.history[0, 0, 2] != 63 and output.history[1, 0, 4] != 63
    with pytest.raises(ValueError, match="numbers must return"):
        replay(llada, ids, None, lambda step, shape: torch.zeros(1), **call)


def test_selection_temperature_draws_slots(llada):
    ids = torch.tensor([[5, 9]])
    call = {"max_new_tokens": 6, "output_history": True}
    orders = {
        tuple((dkv.generate(llada, ids, **call, alg_temp=5.0, seed=s).history[0, 0] == 63).tolist()) for s in range(8)
    }
    assert len(orders) > 1


def test_streamer_gets_prompt_drafts_and_result(llada):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, ids):
            self.seen.append(("put", ids))

        def put_draft(self, ids):
            self.seen.append(("draft", ids))

        def end(self):
            self.seen.append(("end", None))

    ids, streamer = torch.tensor([[5, 9]]), Streamer()
    output = dkv.generate(llada, ids, max_new_tokens=3, streamer=streamer)
    kinds = [kind for kind, _ in streamer.seen]
    assert kinds == ["put", "draft", "draft", "draft", "put", "end"]
    assert torch.equal(streamer.seen[0][1], ids) and torch.equal(streamer.seen[-2][1], output.sequences[:, 2:])
    assert [int((x == 63).sum()) for kind, x in streamer.seen if kind == "draft"] == [2, 1, 0]


def test_generations_on_one_model_do_not_disturb_each_other(llada):
    prompts = [torch.tensor([[i, i + 1, i + 2]]) for i in range(1, 5)]
    call = {"max_new_tokens": 12, "cache": dkv.DecodeCache(4)}
    expected = [dkv.generate(llada, ids, **call).sequences for ids in prompts]
    found = {}

    def work(i):
        found[i] = dkv.generate(llada, prompts[i], **call).sequences

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_an_interrupted_generation_leaves_the_model_as_it_was(llada):
    class Stop(Exception):
        pass

    class Streamer:
        def put(self, ids):
            pass

        def put_draft(self, ids):
            raise Stop

    ids, call = torch.tensor([[5, 9]]), {"max_new_tokens": 4, "cache": dkv.DecodeCache(2)}
    before = dkv.generate(llada, ids, **call).sequences
    with pytest.raises(Stop):
        dkv.generate(llada, ids, **call, streamer=Streamer())
    assert torch.equal(dkv.generate(llada, ids, **call).sequences, before)
