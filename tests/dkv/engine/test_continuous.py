"""Sequences that join and leave the rows of a running generation get the tokens that they get alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dkv
from dkv.engine.config import DiffusionConfig
from dkv.engine.continuous import ContinuousBatch
from tests.dkv.conftest import EOS, small_model
from tests.dkv.engine.test_rows import decoding

ROWS, SLOTS = 3, 24


def join(batch, asked, call):
    """Let prompts with budgets and seeds join, by row."""
    prompts = [torch.tensor(prompt, dtype=torch.int64) for prompt, _, _ in asked.values()]
    batch.join([*asked], prompts, [DiffusionConfig(**call, max_new_tokens=n, seed=s) for _, n, s in asked.values()])


def served(model, call, asked, rng, leave=0.0):
    """The tokens of prompts with budgets and seeds, by number, as rows become free; some leave before they are done."""
    batch = ContinuousBatch(model, ROWS, SLOTS, DiffusionConfig(**call))
    found, holders, left = {}, [None] * ROWS, list(enumerate(asked))
    while left or any(holder is not None for holder in holders):
        free = [row for row in range(ROWS) if holders[row] is None and rng.random() < 0.5][: len(left)]
        rng.shuffle(free)
        for row in free:
            holders[row], _ = left.pop(0)
        if free:
            join(batch, {row: asked[holders[row]] for row in free}, call)
        if batch.numbers:
            batch.step()
        for row, number in enumerate(holders):
            if number is not None and (row not in batch.numbers or rng.random() < leave):
                prompt, new, _ = asked[number]
                if row not in batch.numbers:
                    found[number] = batch.rows.tokens[row, len(prompt) : len(prompt) + new].clone()
                batch.leave(row)
                holders[row] = None
    return found


def drawn(rng, count):
    return [
        ([rng.randrange(61) for _ in range(rng.randrange(1, 10))], rng.randrange(0, 11), rng.randrange(99))
        for _ in range(count)
    ]


def check(model, call, asked, rng, leave=0.0):
    for number, tokens in served(model, call, asked, rng, leave).items():
        prompt, new, seed = asked[number]
        ids = torch.tensor([prompt])
        alone = dkv.generate(model, ids, max_new_tokens=new, seed=seed, **call).sequences[0, len(prompt) :]
        assert torch.equal(tokens, alone), number


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(["llada", "dream"]), decoding(), st.sampled_from([None, EOS]), st.integers(0, 99))
def test_a_row_that_joins_gets_what_it_gets_alone(models, name, call, eos, seed):
    rng = random.Random(seed)
    check(models(name), {**call, "eos_token_id": eos}, drawn(rng, 5), rng, leave=0.05)


@pytest.fixture(scope="module")
def models(llada, dream):
    return {"llada": llada, "dream": dream}.__getitem__


@pytest.mark.parametrize("how", [{}, {"cache": dkv.DecodeCache(2)}, {"edit_threshold": 0.3}, {"temperature": 0.7}])
def test_blocks_join_too(how):
    model, rng = small_model(attention="block", block_length=4), random.Random(1)
    check(model, how, drawn(rng, 8), rng, leave=0.1)


def test_nothing_of_a_row_that_nobody_has_is_computed(llada):
    batch = ContinuousBatch(llada, ROWS, SLOTS, DiffusionConfig())
    assert batch.numbers == [] and batch.status.active == [0] * ROWS
    join(batch, {1: ([5, 9], 4, 0)}, {})
    assert batch.numbers == [1] and batch.status.active == [0, 6, 0]
    batch.leave(1)
    assert batch.numbers == [] and batch.status.masked == [0] * ROWS


def test_what_has_no_room_is_refused_and_changes_nothing(llada):
    batch = ContinuousBatch(llada, ROWS, SLOTS, DiffusionConfig())
    with pytest.raises(ValueError, match="a prompt of 20 tokens and its answer need 25 slots, a row has 24"):
        join(batch, {1: ([5, 9], 4, 0), 0: ([1] * 20, 5, 0)}, {})
    assert batch.numbers == []


def test_rows_whose_join_fails_half_way_are_left_clean(monkeypatch):
    """As where a device has no memory for the keys and values to grow into."""
    model, call = small_model(attention="block", block_length=4), {}
    batch = ContinuousBatch(model, ROWS, 250, DiffusionConfig())
    join(batch, {1: ([5, 9], 6, 0)}, call)
    batch.step()

    def short(reach):
        if reach > 150:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(batch.cache, "reserve", short)
        join(batch, {0: ([7], 5, 0), 2: ([7] * 200, 5, 0)}, call)
    assert batch.numbers == [1] and batch.status.active[0] == batch.status.active[2] == 0
    while batch.numbers:
        batch.step()
    alone = dkv.generate(model, torch.tensor([[5, 9]]), max_new_tokens=6)
    assert torch.equal(batch.rows.tokens[1, :8], alone.sequences[0])
    join(batch, {2: ([7] * 200, 5, 0)}, call)
    while batch.numbers:
        batch.step()
    alone = dkv.generate(model, torch.tensor([[7] * 200]), max_new_tokens=5)
    assert torch.equal(batch.rows.tokens[2, :205], alone.sequences[0])


def test_numbers_that_are_none_are_told_by_row(llada):
    """A row whose logits are no numbers is named; the one beside it goes on as alone."""

    def broken(ids, scores):
        return scores * torch.nan if ids[0, 0] == 7 else scores

    asked = {0: [5, 9], 2: [7, 3]}
    batch = ContinuousBatch(llada, ROWS, SLOTS, DiffusionConfig(), processor=broken)
    join(batch, {row: (prompt, 4, 0) for row, prompt in asked.items()}, {})
    batch.step()
    assert batch.invalid_rows == [2]
    batch.leave(2)
    while batch.numbers:
        batch.step()
        assert batch.invalid_rows == []
    alone = dkv.generate(llada, torch.tensor([[5, 9]]), max_new_tokens=4)
    assert torch.equal(batch.rows.tokens[0, :6], alone.sequences[0])
