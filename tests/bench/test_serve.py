"""Requests that come and go: seeded arrivals, two ways to serve them, and the figures of both."""

import json
import math
from dataclasses import replace

import pytest
import torch

import dkv
from dkv.bench.options import Options, of_checkpoint
from dkv.bench.shapes import as_loaded, random_model, shape, tiny
from dkv.bench.speed import serve
from dkv.bench.speed.arrivals import Answered, Ask, Clock, Served, at_rate, drawn, percentile, summary


@pytest.fixture(scope="module")
def options() -> Options:
    plain = random_model(tiny(shape("llada-8b")), torch.device("cpu"), torch.float32)
    return Options("small", as_loaded(plain), None, prompt=24, new=16, rounds=1, batch=4)


def test_requests_are_seeded_ragged_and_arrive_once_a_second(options):
    asks = drawn(options, 400)
    assert asks == drawn(options, 400) != drawn(options, 400, seed=1)
    lengths, news = {len(ask.prompt) for ask in asks}, [ask.new for ask in asks]
    assert min(lengths) <= 2 and max(lengths) == 24 and min(news) == 1 and max(news) == 16
    # Even in the logarithm: the middle one is the root of both ends.
    assert sorted(news)[200] == pytest.approx(4, abs=1)
    times = [ask.at for ask in asks]
    assert times == sorted(times) and times[-1] == pytest.approx(400, rel=0.2)
    gaps = torch.tensor(times).diff()
    assert gaps.std() == pytest.approx(1, rel=0.2)
    assert [ask.at for ask in at_rate(asks, 2)] == [at / 2 for at in times]
    assert {ask.at for ask in at_rate(asks, math.inf)} == {0.0}
    mask = options.model.spec.mask_token_id
    assert all(mask not in ask.prompt for ask in asks)


def test_both_ways_give_the_tokens_of_a_request_alone(options):
    asks = at_rate(drawn(options, 12), 200)
    served = Served(options.model, 3, 40, {"cache": dkv.DecodeCache(4)})
    for answers in (served.continuous(asks), served.static(asks)):
        assert sorted(answer.ask.number for answer in answers) == list(range(12))
        for answer in answers:
            ask = answer.ask
            how = {"max_new_tokens": ask.new, "seed": ask.number, "cache": dkv.DecodeCache(4)}
            alone = dkv.generate(options.model, torch.tensor([ask.prompt]), **how)
            assert answer.tokens == alone.sequences[0, len(ask.prompt) :].tolist()
            assert 0 < answer.first <= answer.whole


def test_a_static_batch_is_those_that_wait_and_is_answered_as_one(options):
    """The first that arrives is served alone; those who come meanwhile, so many at a time."""
    asks = [replace(ask, at=0.0 if ask.number == 0 else 1e-6) for ask in drawn(options, 8)]
    served, batches = Served(options.model, 3, 40, {"cache": dkv.NoCache()}), []

    def at_once(batch):
        batches.append([ask.number for ask in batch])
        return [[5] * ask.new for ask in batch]

    object.__setattr__(served, "at_once", at_once)
    answers = served.static(asks)
    assert [len(batch) for batch in batches[1:-1]] == [3] * len(batches[1:-1])
    assert [number for batch in batches for number in batch] == list(range(8))
    assert all(answer.first == answer.whole for answer in answers)


def test_the_clock_goes_on_where_nobody_is_there():
    clock = Clock()
    clock.skip_to(100)
    assert 100 <= clock.now() < 101
    clock.skip_to(5)
    assert 100 <= clock.now() < 101


def test_figures_follow_from_the_answers():
    assert [percentile(range(1, 101), share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    asks = [Ask(number, [5], 4, at=float(number)) for number in range(3)]
    found = summary([Answered(ask, [7] * 4, 0.5 + ask.number, 2.0) for ask in asks])
    assert found["requests_per_second"] == 3 / 4 and found["tokens_per_second"] == 12 / 4
    assert (found["first_p50"], found["first_p99"]) == (1.5, 2.5)
    assert found["whole_p50"] == 2.0 and found["per_token_p99"] == 0.5


def test_a_measurement(options, monkeypatch):
    monkeypatch.setattr(serve, "FEWEST", 6)
    monkeypatch.setattr(serve, "MOST", 6)
    monkeypatch.setattr(serve, "LOADS", (0.8,))
    found = json.loads(json.dumps(serve.measure(replace(options, served=("decode 8", "dual in parts")))))
    kinds = [(row["policy"], row["kind"]) for row in found["overhead"]]
    assert kinds == [(policy, kind) for policy in ("decode 8", "dual in parts") for kind in ("equal", "ragged")]
    assert all(row["ratio"] == row["llm_seconds"] / row["seconds"] for row in found["overhead"])
    assert [(row["load"], row["way"], row["rows"]) for row in found["rows"][:6]] == [
        (load, way, rows) for load in (None, 0.8) for way, rows in (("LLM", 4), ("static", 4), ("LLM, more rows", 16))
    ]
    capacity = found["rows"][0]["requests_per_second"]
    assert found["rows"][3]["rate"] == pytest.approx(0.8 * capacity) and found["requests"]["decode 8"] == 6
    text = serve.table(found)
    assert "dual in parts, 80%: " in text and "x the requests per second of static batches" in text
    assert all(f"  {way}  " in text for way in ("LLM", "static", "LLM, more rows"))


def test_ways_that_differ_are_told(options, monkeypatch):
    monkeypatch.setattr(Served, "at_once", lambda self, batch: [[0] * ask.new for ask in batch])
    with pytest.raises(RuntimeError, match="gave different tokens"):
        serve.measure(options)


@pytest.mark.slow
def test_a_server_is_asked_over_http(monkeypatch):
    for name in ("httpx", "fastapi", "uvicorn"):
        pytest.importorskip(name)
    for name, value in {"FEWEST": 6, "MOST": 6, "LOADS": ()}.items():
        monkeypatch.setattr(serve, name, value)
    found = serve.measure(replace(of_checkpoint("tiny", eager=False), new=16, rounds=1, batch=2))
    inside, server = found["rows"][-2:]
    assert (inside["way"], server["way"]) == ("LLM, to an end", "dkv serve") and server["first_p50"] > 0
    assert server["rate"] == inside["rate"] == pytest.approx(serve.HTTP * found["rows"][0]["requests_per_second"])
