"""The comparison of policies: what is timed, the arithmetic of a row, and a real one on a small model."""

from dataclasses import replace

import pytest
import torch

import dkv
from dkv.bench import options
from dkv.bench.baselines import dkv_cache
from dkv.bench.problems import Exam, Problems
from dkv.bench.shapes import as_loaded, random_model, shape, tiny
from dkv.bench.speed import compare
from dkv.bench.speed.compare import Run, StepTime
from dkv.bench.timing import in_turn
from dkv.engine.replay import replay

CPU = torch.device("cpu")


def small(**settings) -> options.Options:
    plain = random_model(tiny(shape("llada-8b")), CPU, torch.float32)
    policies = ("plain", "decode 8", "prefill", "greedy 4")
    sizes = {"eager": plain, "prompt": 6, "new": 8, "batch": 2, "rounds": 1, "policies": policies}
    return options.Options("small", as_loaded(plain), **{**sizes, **settings})


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves a second whenever it is read."""

    class Clock:
        now = 0.0

        def __call__(self):
            Clock.now += 1
            return Clock.now

    monkeypatch.setattr(compare, "perf_counter", Clock())


def made(seconds, tokens, *steps, share=None):
    return Run(seconds, torch.tensor([tokens]), tuple(StepTime(*step) for step in steps), share)


def test_row_arithmetic():
    runs = {
        ("plain", "dkv"): [
            made(8.0, [1, 2, 3, 4], (True, 10, 2.0), (True, 10, 4.0), share=1.0),
            made(12.0, [1, 2, 3, 4], (True, 10, 3.0), (True, 10, 9.0)),
            made(10.0, [1, 2, 3, 4], (True, 10, 3.0), (True, 10, 3.0)),
        ],
        ("decode 8", "dkv"): [
            made(4.0, [1, 2, 3, 9], (True, 10, 1.0), (False, 2, 0.25), share=0.6),
            made(3.0, [1, 2, 3, 9], (True, 10, 2.0), (False, 4, 0.75)),
            made(10.0, [1, 2, 3, 9], (True, 10, 9.0), (False, 6, 0.5)),
        ],
        ("decode 8", "eager"): [
            made(8.0, [1, 2, 8, 9], (True, None, 5.0), (False, None, 1.0)),
            made(9.0, [1, 2, 8, 9], (True, None, 5.0), (False, None, 1.0)),
            made(10.0, [1, 2, 8, 9], (True, None, 5.0), (False, None, 1.0)),
        ],
    }
    asked = options.Options("x", None, None, prompt=6, new=4, batch=3, rounds=3)
    plain, decode, eager = compare.rows(runs, asked, {("plain", "dkv"): 1.5}, {"plain": 0.5})
    assert [plain[name] for name in ("speed", "slowest", "fastest", "over_eager")] == [1, 1, 1, None]
    # 3 rows of 4 slots in the median of 8, 12 and 10 s.
    assert plain["tokens_per_second"] == pytest.approx(1.2)
    # 8/4, 12/3 and 10/10 within the rounds; the ratio of the medians would be 2.5.
    assert (decode["speed"], decode["slowest"], decode["fastest"]) == (2.0, 1.0, 4.0)
    assert decode["over_eager"] == 2.0 and eager["over_eager"] is None
    assert (eager["speed"], eager["slowest"], eager["fastest"]) == (1.0, 1.0, 12 / 9)
    assert (decode["full_ms"], decode["cached_ms"]) == (2000, 500)
    assert (plain["full_ms"], plain["cached_ms"]) == (3000, None)
    assert (eager["full_ms"], eager["cached_ms"], eager["cached_slots"]) == (5000, 1000, decode["cached_slots"])
    assert (decode["full_slots"], decode["cached_slots"], plain["cached_slots"]) == (10, 2, None)
    assert [(r["passes"], r["full_passes"]) for r in (plain, decode, eager)] == [(2, 2), (2, 1), (2, 1)]
    assert (decode["computed_share"], eager["computed_share"]) == (0.6, 0.6)
    # Against plain, and the baseline against dkv's run of its policy.
    assert [r["same_tokens"] for r in (plain, decode, eager)] == [1.0, 0.75, 0.75]
    assert [r["peak_mb"] for r in (plain, decode, eager)] == [1.5, None, None]
    assert [r["exact"] for r in (plain, decode, eager)] == [0.5, None, None]
    assert decode["seconds"] == [4.0, 3.0, 10.0] and decode["steps"] == 4


def test_contenders_take_turns_and_are_told_and_counted():
    calls, said = [], []

    class Bar:
        set_description = staticmethod(said.append)
        update = staticmethod(lambda: calls.append("counted"))

    ways = {name: lambda name=name: calls.append(name) or name for name in "ab"}
    assert in_turn(ways, 2, Bar, lambda number, name: f"{number} {name}") == {"a": ["a", "a"], "b": ["b", "b"]}
    assert calls == ["a", "counted", "b", "counted"] * 2 and said == ["0 a", "0 b", "1 a", "1 b"]
    assert in_turn(ways) == {"a": ["a"], "b": ["b"]}


def test_step_times_are_those_of_the_passes(clock):
    asked, steps = small(new=4), compare.StepClock()
    replay(asked.model, asked.prompts(), max_new_tokens=4, seed=0, cache=dkv.DecodeCache(0), on_step=steps)
    assert [(step.full, step.slots, step.seconds) for step in steps.steps] == [
        (True, 20, 1.0),
        (True, 20, 1.0),
        (False, 6, 1.0),
        (False, 4, 1.0),
    ]


def test_comparison_of_a_small_model():
    found = compare.measure(small())
    rows = {(row["policy"], row["way"]): row for row in found["rows"]}
    assert list(rows) == [
        ("plain", "dkv"),
        ("plain", "eager"),
        ("decode 8", "dkv"),
        ("decode 8", "eager"),
        ("prefill", "dkv"),
        ("greedy 4", "dkv"),
        ("greedy 4", "eager"),
    ]
    assert list(found["refused"]) == ["prefill"] and "Prefill" in found["refused"]["prefill"]
    assert [rows[policy, "dkv"]["full_passes"] for policy in ("plain", "decode 8", "prefill", "greedy 4")] == [
        8,
        2,
        1,
        2,
    ]
    for row in found["rows"]:
        assert row["passes"] == 8 and len(row["seconds"]) == 1 and row["peak_mb"] > 0
        assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"][0])
        # Scored and committed alike: the random order too is the same for both.
        assert row["way"] == "dkv" or row["same_tokens"] == 1
        assert (row["full_passes"], row["passes"]) == tuple(
            rows[row["policy"], "dkv"][k] for k in ("full_passes", "passes")
        )
    plain, decode = rows["plain", "dkv"], rows["decode 8", "dkv"]
    assert (plain["computed_share"], plain["full_slots"], plain["cached_slots"]) == (1, 28, None)
    assert decode["computed_share"] < 1 and decode["cached_slots"] < 28
    lines = compare.table(found).splitlines()
    assert len([line for line in lines if line.startswith("  eager")]) == 3
    assert lines[2].startswith("policy") and "exact" not in lines[2] and "range" not in lines[2]


def test_no_baseline_is_asked_for(monkeypatch):
    monkeypatch.setattr(dkv_cache, "generate", lambda *args, **more: pytest.fail("the baseline ran"))
    found = compare.measure(small(eager=None, policies=("plain",)))
    assert [(row["way"], row["over_eager"]) for row in found["rows"]] == [("dkv", None)] and found["refused"] == {}


def test_an_error_of_dkv_is_not_taken_for_a_refusal():
    with pytest.raises(ValueError, match="positions"):
        compare.measure(small(prompt=8000, new=8))


def test_exact_counts_whole_answers():
    found = options.of_checkpoint("tiny", eager=False, rounds=1, policies=("plain", "greedy 4"))
    problems = found.exam.problems
    assert (found.prompt, found.new) == (63, 64) and len(problems.answers) == 24
    assert found.prompts().tolist() == found.exam.encoded(0, 1)[0].tolist()
    few = Problems("few", problems.prompts[:2], problems.answers[:2], 64)
    _, texts = Exam(found.model, found.exam.tokenizer, few).decode(0, 2, steps=8)
    for answers, right in ((texts, 1.0), ([texts[0] + "1", texts[1]], 0.5)):
        exam = Exam(found.model, found.exam.tokenizer, replace(few, answers=answers))
        assert compare._exact(replace(found, exam=exam, steps=8), "plain") == right


def test_prompts_are_seeded_and_hold_no_mask():
    asked = small(prompt=4000)
    assert torch.equal(asked.prompts(), asked.prompts()) and asked.prompts().shape == (2, 4000)
    assert set(asked.prompts().unique().tolist()) == set(range(255))


def test_shapes_and_checkpoints_become_options():
    found = options.of_shape("d128x4", 1, "cpu", rounds=2)
    assert (found.name, found.rounds, found.new) == ("d128x4, 1 layer", 2, 128)
    assert found.facts()["dtype"] == "float32" and found.facts()["parameters"] == found.eager.num_parameters
    assert options.of_shape("d128x4", 1, "cpu", eager=False).eager is None
    with pytest.raises(ValueError, match="device='nowhere' cannot be used here"):
        options.of_shape("d128x4", 1, "nowhere")
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'int8'"):
        options.of_shape("d128x4", 1, "cpu", "int8")
