"""The likelihood of answers against sums over all masks, made by plain forward passes."""

import random
from itertools import combinations
from math import comb, sqrt

import pytest
import torch

import dkv
from dkv.engine.output import Stats
from dkv.tools import likelihood
from dkv.tools.likelihood import are_greedy, log_likelihoods, masked_places
from tests.dkv.conftest import GOLDEN, small_model
from tests.dkv.engine.test_blocks import KINDS

MASK = 63
FAMILIES = GOLDEN / "families"
PROMPT = [5, 17, 3, 44, 21]


def log_probabilities(model, tokens):
    """[S, V], where row s predicts slot s."""
    logits = model(torch.tensor([tokens]))[0]
    if model.spec.shifted:
        logits = torch.cat((logits[:1], logits[:-1]))
    return logits.log_softmax(-1)


def exact(model, prompt, answer):
    """The expectation that the estimate has, from its definition."""
    total = 0.0
    for count in range(1, len(answer) + 1):
        for places in combinations(range(len(answer)), count):
            tokens = list(prompt) + [MASK if i in places else t for i, t in enumerate(answer)]
            found = log_probabilities(model, tokens)
            part = sum(found[len(prompt) + i, answer[i]].item() for i in places)
            total += len(answer) / count * part / comb(len(answer), count) / len(answer)
    return total


def filled(model, prompt, length):
    """What plain decoding gives, the most confident slot first."""
    tokens = list(prompt) + [MASK] * length
    for _ in range(length):
        found = log_probabilities(model, tokens)
        found[:, MASK] = -torch.inf
        best, ids = found.max(-1)
        best[[i for i, t in enumerate(tokens) if t != MASK]] = -torch.inf
        tokens[int(best.argmax())] = int(ids[best.argmax()])
    return tokens[len(prompt) :]


def values(model, questions, **how):
    found = dict(log_likelihoods(model, questions, **how))
    return [found[i] for i in range(len(questions))]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_an_answer_with_few_masks_gets_the_exact_expectation(model, length):
    answer = [9, 30, 2, 51][:length]
    assert values(model, [(PROMPT, answer)]) == pytest.approx([exact(model, PROMPT, answer)], abs=1e-4)


def test_estimates_from_drawn_masks_are_right_on_average(model):
    question, count = (PROMPT, [9, 30, 2, 51]), 150
    estimates = torch.tensor([values(model, [question], samples=7, seed=seed)[0] for seed in range(count)])
    error = estimates.std().item() / sqrt(count)
    assert error > 0.001
    assert abs(estimates.mean().item() - exact(model, *question)) < 4 * error


def test_more_masks_come_closer(model):
    question = (PROMPT, [9, 30, 2, 51, 12, 8, 40, 33])
    right = values(model, [question], samples=255)[0]
    off = {}
    for samples in (4, 200):
        found = [values(model, [question], samples=samples, seed=seed)[0] for seed in range(16)]
        off[samples] = sqrt(sum((value - right) ** 2 for value in found) / 16)
    # The error falls with the root of the samples, here by 7.
    assert 0 < off[200] < off[4] / 3
    assert off[200] < 0.05 * abs(right)


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (4, 15), (4, 14), (10, 20), (100, 32), (3, 2)])
def test_every_token_has_the_same_weight_in_all_masks_together(length, samples):
    masks = masked_places(length, samples, random.Random(3))
    assert len(masks) == min(samples, 2**length - 1)
    assert all(places <= set(range(length)) and places for places, _ in masks)
    assert sum(weight * len(places) for places, weight in masks) == pytest.approx(length)


def test_drawn_masks_have_every_count_equally_often():
    counts = sorted(len(places) for places, _ in masked_places(10, 20, random.Random(0)))
    assert counts == sorted(2 * list(range(1, 11)))


def test_a_value_does_not_depend_on_batch_neighbours_or_order(model):
    questions = [(PROMPT, [9, 30]), (PROMPT[:2], [4]), (PROMPT * 3, list(range(10))), (PROMPT, [7, 7]), (PROMPT, [1])]
    alone = [values(model, [question], samples=20)[0] for question in questions]
    for batch_size in (1, 3, 64):
        together = values(model, questions[::-1], samples=20, batch_size=batch_size)[::-1]
        assert together == pytest.approx(alone, abs=1e-4)


def test_the_seed_decides_what_is_masked(llada):
    question = (PROMPT, list(range(10)))
    first, again, other = (values(llada, [question], samples=5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != pytest.approx(other, abs=1e-3)


def test_choices_of_one_token_share_a_pass(model):
    stats = Stats()
    found = values(model, [(PROMPT, [token]) for token in range(64)], batch_size=1, stats=stats)
    assert (stats.passes, stats.computed_slots) == (1, len(PROMPT) + 1)
    assert sum(torch.tensor(found).exp()) == pytest.approx(1, abs=1e-4)


def test_heads_are_applied_to_parts_of_the_rows(model, monkeypatch):
    whole = values(model, [(PROMPT, [9, 30, 2])])
    monkeypatch.setattr(likelihood, "LOGITS_AT_A_TIME", 64)
    assert values(model, [(PROMPT, [9, 30, 2])]) == pytest.approx(whole, abs=1e-5)


def test_an_empty_answer_is_certain(model):
    assert dict(log_likelihoods(model, [(PROMPT, [])])) == {0: 0.0}
    assert dict(are_greedy(model, [(PROMPT, [])])) == {0: True}


def test_an_answer_is_greedy_if_plain_decoding_gives_it(model):
    prompts = [PROMPT, PROMPT[:2], PROMPT[1:] * 2]
    questions = [(prompt, filled(model, prompt, length)) for prompt in prompts for length in (1, 3, 6)]
    changed = [(prompt, [*answer[:-1], (answer[-1] + 1) % 60]) for prompt, answer in questions]
    found = dict(are_greedy(model, questions + changed, batch_size=2))
    assert [found[i] for i in range(len(found))] == [True] * 9 + [False] * 9


@pytest.mark.parametrize("which", [log_likelihoods, are_greedy])
@pytest.mark.parametrize(
    ("question", "message"),
    [
        (([1] * 250, [2] * 7), "question 0 has a prompt of 250 and an answer of 7 tokens, the model has 256 positions"),
        ((PROMPT, [64]), "question 0 has the id 64"),
        (([-1], [2]), "question 0 has the id -1"),
    ],
)
def test_questions_that_do_not_fit_are_named(llada, which, question, message):
    with pytest.raises(ValueError, match=message):
        list(which(llada, [question]))


def test_a_shifted_model_needs_a_prompt(dream):
    with pytest.raises(ValueError, match="question 0 has no prompt"):
        list(log_likelihoods(dream, [([], [2])]))


@pytest.mark.parametrize("setting", ["samples", "batch_size"])
def test_counts_are_at_least_one(llada, setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
        list(log_likelihoods(llada, [(PROMPT, [1])], **{setting: 0}))


def test_logits_that_are_no_numbers_are_told(build):
    model = build()
    model.head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        list(log_likelihoods(model, [(PROMPT, [1])]))


def exact_in_blocks(model, prompt, answer, length=4):
    """From its definition: block by block, as the whole text up to the block's end sees it, computed anew."""
    spec, start, total = model.spec, len(prompt), 0.0
    offset = -start % length if spec.blocks_from_prompt else 0
    text, causal = [*prompt, *answer], spec.attention == "prefix_causal"

    def found(tokens, first):
        slot = torch.arange(len(tokens))
        ids = torch.where(slot < first, slot, max(first, 0)) if causal else (slot + offset) // length
        return model(torch.tensor([tokens]), block_ids=ids[None])[0].log_softmax(-1)

    slots = list(range(start, len(text)))
    while slots:
        first = (slots[0] + offset) // length * length - offset
        end = first + length
        if spec.seeded and slots[0] == first > 0:
            total += found(text[:first], first)[first - 1, text[first]].item()
            slots = slots[1:]
        own = [slot for slot in slots if slot < end]
        slots = slots[len(own) :]
        size = min(end, len(text)) if spec.blocks_from_prompt else end
        for count in range(1, len(own) + 1):
            for places in combinations(own, count):
                tokens = [MASK if s in places or s >= len(text) else text[s] for s in range(size)]
                logs = found(tokens, first)
                part = sum(logs[s - spec.shifted, text[s]].item() for s in places)
                total += part / count / comb(len(own), count)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_causal_model_goes_block_by_block(kind):
    model = small_model(**{"attention": "block", "block_length": 4, **KINDS[kind]})
    questions = [(PROMPT, [9, 30, 2, 51, 8]), (PROMPT[:4], [9, 30, 2, 51, 8, 1]), (PROMPT[:3], [4])]
    stats = Stats()
    found = values(model, questions, batch_size=7, stats=stats)
    assert found == pytest.approx([exact_in_blocks(model, *question) for question in questions], abs=1e-4)
    drawn = values(model, questions, samples=3)
    assert drawn != pytest.approx(found, abs=1e-6)


def test_a_block_causal_answer_is_greedy_if_decoding_gives_it():
    model = small_model(attention="block", block_length=4)
    given = dkv.generate(model, torch.tensor([PROMPT]), max_new_tokens=6, eos_token_id=[]).sequences[0, 5:].tolist()
    questions = [(PROMPT, given), (PROMPT, [*given[:-1], (given[-1] + 1) % 60])]
    assert dict(are_greedy(model, questions)) == {0: True, 1: False}


def test_models_without_such_a_likelihood_are_told():
    with pytest.raises(ValueError, match="attention_block="):
        list(log_likelihoods(small_model(attention="block"), [(PROMPT, [1])]))
    gemma = dkv.load(FAMILIES / "diffusion_gemma" / "gemma_tiny", device="cpu")
    with pytest.raises(ValueError, match="DiffusionGemma has no masks"):
        list(log_likelihoods(gemma, [(PROMPT, [1])]))
