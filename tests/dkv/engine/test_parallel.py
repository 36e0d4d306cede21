"""Several tokens a step: as many as the model is sure of."""

import math

import pytest
import torch

import dkv
from dkv.core.sequences import mask_of
from dkv.engine.commit import confident_slots, first_slots
from dkv.engine.config import DiffusionConfig
from dkv.engine.rules import sureness
from dkv.kernels.commit.reference import Chosen
from dkv.kernels.commit.reference import chosen as chosen_entries
from tests.kernels.sweeps import sweep

IDS = torch.tensor([[5, 9, 11], [7, 3, 20]])
POLICIES = [
    dkv.NoCache(),
    dkv.DecodeCache(3),
    dkv.PrefillCache(),
    dkv.PrefillDecodeCache(3),
    dkv.GreedyCache(3, 2),
    dkv.PrefixCache(),
    dkv.DualCache(),
    dkv.DualCache(delayed=True),
    dkv.SuffixWindow(3),
    dkv.Rollout(0.3, 4, 4.0),
    dkv.ElasticCache(4, 0.99),
]


def counts(settings, confidences, eligible=None, least=1):
    log = torch.tensor([confidences]).log()
    eligible = torch.ones_like(log, dtype=torch.bool) if eligible is None else torch.tensor([eligible])
    rules = sureness(DiffusionConfig(**settings))
    return int(confident_slots(log, log, None, eligible, torch.tensor([[least]]), rules)[1])


def test_threshold_counts():
    assert counts({"threshold": 0.9}, [0.95, 0.2, 0.91, 0.89]) == 2
    assert counts({"threshold": 0.9}, [0.5, 0.2]) == 1
    assert counts({"threshold": 0.9}, [0.5, 0.2, 0.1], least=2) == 2
    assert counts({"threshold": 0.9}, [0.95, 0.97, 0.99], eligible=[True, False, True]) == 2
    assert counts({"threshold": 0.0}, [0.5, 0.0, 0.1]) == 3
    assert counts({"threshold": 1.0}, [1.0, 1.0, 0.5]) == 2


def test_factor_counts():
    """The largest n with (n + 1)(1 - c_n) < f: 2 x 0.01, 3 x 0.05, 4 x 0.1, 5 x 0.3."""
    confidences = [0.9, 0.99, 0.7, 0.95]
    for factor, expected in ((0.01, 1), (0.1, 1), (0.2, 2), (0.41, 3), (1.6, 4), (0.0, 1)):
        assert counts({"factor": factor}, confidences) == expected


SETTINGS = [
    {"threshold": 0.3},
    {"threshold": -1.5, "confidence": "entropy"},
    {"threshold": 0.2, "confidence": "margin"},
    {"factor": 1.0},
    {"threshold": 0.4, "threshold_decay": 0.6},
    {"entropy_bound": 3.0},
    {"entropy_bound": 4.0, "entropy_form": "code", "confidence": "margin"},
    {"entropy_bound": 3.0, "confidence": "entropy"},
    {"threshold": 0.2, "near_threshold": 0.1},
    {"threshold": -1.5, "near_threshold": -2.5, "radius": 1, "confidence": "entropy"},
]


@pytest.mark.parametrize(("cache", "settings"), sweep(POLICIES, SETTINGS, quick=4))
def test_any_policy_takes_a_threshold(model, cache, settings):
    """Every row fills at least one slot a step of the block, and more where it is sure; nothing stays masked."""
    call = {"max_new_tokens": 12, "block_length": 6, "cache": cache, "output_history": True, **settings}
    output = dkv.generate(model, IDS, **call)
    assert not (output.sequences == 63).any() and output.stats.passes <= 12
    assert output.stats.tokens_per_forward == 24 / output.stats.passes
    left = torch.cat((torch.full((1, 2), 12), (output.history == 63).sum(2)))
    assert ((left[:-1] - left[1:] >= 1) | (left[:-1] == 0)).all()


@pytest.mark.parametrize("cache", POLICIES, ids=str)
def test_a_rule_that_all_fulfil_takes_one_pass_a_block(model, cache):
    for rule in ({"threshold": 0.0}, {"entropy_bound": 1e6}, {"entropy_bound": 1e6, "entropy_form": "code"}):
        output = dkv.generate(model, IDS, max_new_tokens=12, block_length=4, cache=cache, **rule)
        assert output.stats.passes == 3 and output.stats.tokens_per_forward == 8


@pytest.mark.parametrize("cache", [dkv.NoCache(), dkv.DecodeCache(3), dkv.PrefixCache(), dkv.DualCache()], ids=str)
def test_a_rule_that_none_fulfils_is_decoding_one_by_one(model, cache):
    call = {"max_new_tokens": 8, "block_length": 4, "cache": cache}
    expected = dkv.generate(model, IDS, **call, schedule="blocks")
    for rule in ({"threshold": 1.0}, {"threshold": 1.0, "near_threshold": 0.0}, {"entropy_bound": 0.0}):
        output = dkv.generate(model, IDS, **call, **rule)
        assert torch.equal(output.sequences, expected.sequences) and output.stats.passes == 8


@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"factor": 0.0}, {"entropy_bound": 0.0}], ids=str)
def test_steps_are_a_limit(model, settings):
    """Never behind the plan: with nothing sure, the tokens are those of the plan itself."""
    call = {"max_new_tokens": 12, "steps": 5, "cache": dkv.DecodeCache(3)}
    for schedule in ("blocks", "time"):
        expected = dkv.generate(model, IDS, **call, schedule=schedule)
        output = dkv.generate(model, IDS, **call, schedule=schedule, **settings)
        assert output.stats.passes <= 5 and not (output.sequences == 63).any()
        if schedule == "blocks":
            assert torch.equal(output.sequences, expected.sequences)


def test_slots_of_a_plan_are_those_of_the_commit():
    """What is planned from remembered confidences is what the commit fills where they are those of the pass."""
    for settings in (
        {"threshold": 0.6},
        {"factor": 0.9},
        {"entropy_bound": 1.0},
        {"entropy_bound": 1.0, "entropy_form": "code"},
        {"threshold": 0.8, "near_threshold": 0.5, "radius": 2},
    ):
        rules = sureness(DiffusionConfig(**settings))
        for finite_only, least in ((False, 1), (True, 2)):
            confidence, entropy, open_ = torch.rand(3, 9).log(), torch.rand(3, 9), torch.rand(3, 9) < 0.8
            confidence[torch.rand(3, 9) < 0.2] = -torch.inf
            rules, counts = rules._replace(finite_only=finite_only), torch.full((3, 1), least)
            chosen, number = confident_slots(confidence, confidence, entropy, open_, counts, rules)
            planned = mask_of(first_slots(confidence, chosen, number, 9), open_)
            for row in range(3):
                here = open_[row].nonzero()[:, 0]
                choice = Chosen(here, confidence[row, here], confidence[row, here], entropy[row, here])
                found = torch.zeros(9, dtype=torch.bool)
                found[here[chosen_entries(here, choice, least, rules)]] = True
                assert torch.equal(planned[row], found), (settings, finite_only)


def test_being_ahead_of_the_plan_buys_slower_steps(stub):
    """Three sure slots at once, then one by one until the plan has caught up: 8 slots in 4 steps leave 6, 4, 2, 0."""

    def script(call, positions):
        logits = torch.zeros(*positions.shape, 64)
        logits[..., 7] = torch.where(positions < 3, 9.0, 2.0)
        return logits

    output = dkv.generate(
        stub(script), torch.zeros(1, 0).long(), max_new_tokens=8, steps=4, threshold=0.9, output_history=True
    )
    assert (output.history == 63).sum((1, 2)).tolist() == [5, 4, 2, 0]


def test_rows_reach_their_blocks_at_their_own_time(llada):
    """A row that is sure goes on to the next block while its neighbour stays."""
    call = {"max_new_tokens": 12, "block_length": 3, "threshold": 0.25, "cache": dkv.DualCache()}
    output = dkv.generate(llada, IDS, **call, output_active=True)
    passes = []
    for row in range(2):
        alone = dkv.generate(llada, IDS[row : row + 1], **call, output_active=True)
        steps = len(alone.active)
        assert torch.equal(output.active[:steps, row], alone.active[:, 0])
        passes.append(steps)
    assert output.stats.passes == max(passes) and math.prod(passes) > 1
