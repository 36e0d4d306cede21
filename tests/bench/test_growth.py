"""Exponents are recovered, and a generation timed in samples does the work of the whole one."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dkv
from dkv.bench import steps
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.shapes import as_loaded, random_model, shape, tiny
from dkv.bench.speed import growth

CPU = torch.device("cpu")
PROMPT = 8


@pytest.fixture(scope="module")
def plain_model():
    return random_model(tiny(shape("llada-8b")), CPU, torch.float32)


@pytest.fixture(scope="module")
def options(plain_model):
    return Options("tiny", as_loaded(plain_model), None, prompt=PROMPT)


@pytest.mark.parametrize("exponent", [0, 0.3, 1, 1.7])
def test_fit_recovers_a_power_law(exponent):
    x = growth.LENGTHS
    found, low, high = growth.fit(x, [0.02 * n**exponent for n in x])
    assert found == pytest.approx(exponent, abs=1e-9) and high - low == pytest.approx(0, abs=1e-6)
    # Of 95 % intervals about one in twenty misses.
    noise, hits = random.Random(0), 0
    for _ in range(400):
        found, low, high = growth.fit(x, [0.02 * n**exponent * math.exp(noise.gauss(0, 0.05)) for n in x])
        assert found == pytest.approx(exponent, abs=0.1) and low < found < high
        hits += low <= exponent <= high
    assert 0.92 < hits / 400 < 0.98


def test_fit_of_few_lengths():
    assert growth.fit([10, 40], [1, 2]) == (pytest.approx(0.5), None, None)
    with pytest.raises(ValueError, match="at least two lengths"):
        growth.fit([10, 10], [1, 2])


def test_sampled_steps_lie_evenly():
    steps = list(range(100))
    assert growth.spread(steps, 5) == [10, 30, 50, 70, 90]
    assert growth.spread(steps[:3], 5) == [0, 1, 2] and growth.spread([], 5) == []


@pytest.mark.parametrize(
    ("family", "policy"), [*(("llada-8b", policy) for policy in growth.THEORY), ("dream-7b", "decode 8")]
)
def test_estimate_counts_the_work_of_the_generation(options, family, policy):
    if family == "dream-7b":
        options = replace(options, model=random_model(tiny(shape(family)), CPU, torch.float32), batch=2)
    settings, new = of_lineup(policy).settings, 40
    with torch.no_grad():
        stats = dkv.generate(
            options.model, options.prompts(), max_new_tokens=new, schedule="blocks", seed=0, **settings
        ).stats
        every_step = growth.estimate(options, settings, new, samples=(new, new))
        few = growth.estimate(options, settings, new)
    assert every_step["computed"] == stats.computed_slots
    assert few["computed"] == pytest.approx(stats.computed_slots, rel=0.03)
    assert few["operations"] == pytest.approx(every_step["operations"], rel=0.03)
    assert few["seconds"] > 0


def test_skipped_steps_leave_the_rows_as_if_they_had_been_run(options):
    with torch.no_grad():
        engine = steps.start(options, {"cache": dkv.DecodeCache(8)}, 32)
        engine.step()
        steps.skip(engine, 19)
        assert engine.rows.timetable.at.tolist() == [20]
        assert int(engine.rows.masked.sum()) == engine.status.masked[0] == 12
        assert int(engine.rows.fresh.sum()) == 1
        assert engine.status.active == [13]


@pytest.mark.parametrize("active", [5, 40])
def test_operations_are_those_of_the_products(plain_model, active):
    slots, rows, spec = 40, 3, plain_model.spec
    ids = torch.zeros(1, active, dtype=torch.int64)
    # As plain products, which the counter knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = plain_model.step(
            ids, torch.arange(active)[None], dkv.KVCache(1, slots), outputs=torch.arange(rows)[None]
        )
        plain_model.head(hidden)
    assert counter.get_total_flops() == growth.operations(spec, active, rows, slots)


def test_measure_gives_a_row_per_length_and_a_fit_per_policy(options, monkeypatch):
    monkeypatch.setattr(growth, "LENGTHS", (8, 16, 32))
    monkeypatch.delitem(growth.THEORY, "greedy 16")
    found = json.loads(json.dumps(growth.measure(options)))
    keys = [(row["policy"], row["new"]) for row in found["rows"]]
    assert keys == [(policy, new) for policy in growth.THEORY for new in (8, 16, 32)]
    for row in found["rows"]:
        assert row["whole"] and row["prompt"] == PROMPT
        assert row["ms_per_slot"] == pytest.approx(row["seconds"] / row["new"] * 1e3)
    assert [row["policy"] for row in found["fits"]] == list(growth.THEORY) and found["left_out"] == []
    counted = {row["policy"]: row["counted"] for row in found["fits"]}
    assert counted["greedy, no refresh"] < 0.3 < counted["decode 8"] and counted["plain"] > 0.8
    text = growth.table(found)
    assert "Estimates of 9 whole generations" in text and "greedy, no refresh " in text


@pytest.mark.parametrize(("exponent", "said"), [(0.29, "keeps its limit of 0.3"), (0.31, "MISSES its limit of 0.3")])
def test_table_says_whether_greedy_keeps_its_limit(exponent, said):
    rows = [
        {
            "policy": "greedy, no refresh",
            "new": new,
            "prompt": 0,
            "ms_per_slot": new**exponent,
            "seconds": 1.0,
            "whole": False,
            "estimate": 1.0,
            "operations_per_slot": float(new),
        }
        for new in growth.LENGTHS
    ]
    found = {"rows": rows, "fits": [growth._fit_of("greedy, no refresh", rows)], "left_out": []}
    assert f"greedy, no refresh {said}." in growth.table(found)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.25, "keeps"),
        (0.4, 0.5, "MISSES"),
        (-0.5, 0.9, "varies too much to tell whether it keeps"),
        (None, None, "was run at too few lengths to tell whether it keeps"),
    ],
)
def test_a_limit_is_judged_by_the_whole_interval(low, high, said):
    assert growth._held({"exponent": 0.2, "low": low, "high": high, "limit": 0.3}) == said


def test_lengths_left_out_are_named(options, monkeypatch):
    monkeypatch.setattr(growth, "LENGTHS", (8, 16, 32))
    monkeypatch.setattr(growth, "BUDGET", 0)
    monkeypatch.setattr(growth, "THEORY", {name: growth.THEORY[name] for name in ("plain", "decode 8")})
    found = growth.measure(options)
    assert [row["new"] for row in found["rows"]] == [8] * len(growth.THEORY)
    assert [(row["policy"], row["new"]) for row in found["left_out"]] == [
        (policy, new) for policy in growth.THEORY for new in (16, 32)
    ]
    assert found["fits"] == []
    assert "Left out: decode 8 at 32 new slots (its samples would take about" in growth.table(found)


def test_lengths_beyond_the_model_are_left_out_or_refused(options, monkeypatch):
    monkeypatch.setattr(growth, "LENGTHS", (8, 16, 32))
    monkeypatch.setattr(growth, "THEORY", {"decode 8": growth.THEORY["decode 8"]})
    monkeypatch.setattr(options.model, "spec", replace(options.model.spec, max_positions=PROMPT + 16))
    found = growth.measure(options)
    assert {row["new"] for row in found["rows"]} == {8, 16}
    assert {row["why"] for row in found["left_out"]} == {"the model has 24 positions"}
    with pytest.raises(ValueError, match="give a shorter prompt"):
        growth.measure(replace(options, prompt=PROMPT + 9))
