"""Whoever asks first is served first; nobody waits for longer than that, and each is told its own answer alone."""

import random

import pytest

import dkv
from tests.dkv.serving.test_llm import CALLS, alone, asked

ROWS, SLOTS = 3, 64


def served_by(llada, **how):
    return dkv.LLM(llada, max_length=SLOTS, max_slots=ROWS * SLOTS, **how)


def test_rows_go_to_those_who_came_first(llada):
    """Long prompts and other settings wait for those before them alone; those behind them, for them."""
    rng, llm, requests = random.Random(0), served_by(llada), []
    for number in range(60):
        long = number % 5 == 0
        prompt = [rng.randrange(61) for _ in range(50 if long else 3)]
        requests.append(llm.add(prompt, max_new_tokens=rng.randrange(1, 9), **rng.choice(CALLS[:4] + CALLS[5:])))
        before = [request.stats.passes for request in requests]
        running = [request for request in requests if request.state == "running"]
        left = max(llm.waiting - (ROWS - llm.running), 0)
        llm.step()
        # No row is left to nobody, and no more are given than there are.
        assert llm.running <= ROWS and llm.waiting == left
        # Whatever its settings are, who has a row goes on in every step.
        assert all(request.stats.passes == before[request.number] + 1 for request in running)
        # Nobody has a row while one who came before waits.
        waiting = [request.number for request in requests if request.state == "waiting"]
        assert waiting == list(range(60))[number + 1 - len(waiting) : number + 1]
    while llm.running or llm.waiting:
        llm.step()
    starts = [request.stats.started for request in requests]
    assert starts == sorted(starts) and all(request.state == "finished" for request in requests)


def test_who_waits_has_a_row_after_as_many_steps_as_those_before_need(llada):
    """A request of its own settings, before which many others came and behind which many come."""
    llm = served_by(llada)
    ahead = [llm.add([5, number], max_new_tokens=4) for number in range(7)]
    late, steps = llm.add([9] * 40, max_new_tokens=4, temperature=0.5, seed=1), 0
    while late.state == "waiting":
        llm.add([7], max_new_tokens=4)
        llm.step()
        steps += 1
    # Three at a time, of four steps each.
    assert all(request.done or request.row is not None for request in ahead) and steps == 2 * 4 + 1


def test_no_more_wait_than_may(llada):
    llm = served_by(llada, max_waiting=2)
    requests = [llm.add([5], max_new_tokens=3) for _ in range(ROWS + 2)]
    with pytest.raises(dkv.Full, match=f"{ROWS + 2} requests wait already, and max_waiting is 2"):
        llm.add([5], max_new_tokens=3)
    llm.step()
    with pytest.raises(dkv.Full, match="2 requests wait already, and max_waiting is 2"):
        llm.add([5], max_new_tokens=3)
    llm.cancel(requests[-1])
    last = llm.add([5], max_new_tokens=3)
    while not last.done:
        llm.step()
    assert [request.state for request in requests] == ["finished"] * (ROWS + 1) + ["cancelled"]


@pytest.mark.slow
def test_thousands_of_requests_get_what_they_get_alone(llada):
    """10,000 at random times, of any settings; some leave, some fail, and none harms another."""

    def raising(ids, scores):
        raise RuntimeError("a processor of this request")

    rng = random.Random(7)
    kinds = list(asked(rng, 300))
    expected = [alone(llada, prompt, settings).tolist() for prompt, settings in kinds]
    llm = dkv.LLM(llada, max_length=32, max_slots=64 * 32)
    left, going, counts = 10_000, {}, {"finished": 0, "cancelled": 0, "failed": 0}
    while left or going:
        for _ in range(min(left, rng.randrange(0, 12))):
            left, kind = left - 1, rng.randrange(len(kinds))
            prompt, settings = kinds[kind]
            fails = raising if rng.random() < 0.002 else None
            going[llm.add(prompt, logits_processor=fails, **settings)] = kind
        for request in rng.sample(sorted(going, key=lambda r: r.number), min(len(going), rng.randrange(3))):
            if rng.random() < 0.1:
                llm.cancel(request)
                counts[request.state] += going.pop(request) >= 0
        for request in llm.step():
            kind = going.pop(request)
            counts[request.state] += 1
            assert request.state == ("failed" if request.processor else "finished")
            if not request.processor:
                assert request.tokens.tolist() == expected[kind]
    assert sum(counts.values()) == 10_000 and min(counts.values()) > 5 and llm.running == llm.waiting == 0
