"""`dkv.LLM`: requests of any settings share rows, and each gets the tokens that it gets alone."""

import random

import pytest
import torch

import dkv
from dkv.serving import memory
from tests.dkv.conftest import small_model

CALLS = [
    {},
    {"steps": 3, "block_length": 8},
    {"cache": "decode"},
    {"cache": "dual", "block_length": 4},
    {"temperature": 0.7},
    {"cfg_scale": 1.0},
]


def asked(rng, count):
    for number in range(count):
        prompt = [rng.randrange(61) for _ in range(rng.randrange(1, 12))]
        yield prompt, {"max_new_tokens": rng.randrange(1, 13), "seed": number, **rng.choice(CALLS)}


def alone(model, prompt, settings):
    return dkv.generate(model, torch.tensor([prompt]), **settings).sequences[0, len(prompt) :]


def test_requests_of_any_settings_get_what_they_get_alone(llada):
    prompts, own = zip(*asked(random.Random(0), 20), strict=True)
    llm = dkv.LLM(llada, max_length=32, max_slots=4 * 32)
    requests = llm.generate(prompts, own=own, progress=False)
    assert llm.rows == 4 and (llm.running, llm.waiting) == (0, 0)
    for request, prompt, settings in zip(requests, prompts, own, strict=True):
        assert request.state == "finished" and torch.equal(request.tokens, alone(llada, prompt, settings))
        stats = request.stats
        assert 0 <= stats.queued_seconds <= stats.first_token_seconds <= stats.seconds
        assert stats.new_tokens == settings["max_new_tokens"] and 0 < stats.passes <= stats.new_tokens


def test_arrivals_and_cancels_harm_nobody(llada):
    rng, llm = random.Random(1), dkv.LLM(llada, max_length=32, max_slots=3 * 32)
    left, going, done = list(asked(rng, 24)), {}, {}
    while left or going:
        if left and rng.random() < 0.5:
            prompt, settings = left.pop()
            going[llm.add(prompt, **settings)] = prompt, settings
        if going and rng.random() < 0.05:
            request = rng.choice(list(going))
            llm.cancel(request)
            assert request.state == "cancelled" and request.done
            del going[request]
        for request in llm.step():
            done[request] = going.pop(request)
    assert llm.running == llm.waiting == 0 and len(done) > 12
    for request, (prompt, settings) in done.items():
        assert torch.equal(request.tokens, alone(llada, prompt, settings))


def raising(ids, scores):
    raise RuntimeError("a processor of this request")


@pytest.mark.parametrize(
    ("processor", "why"), [(raising, "a processor of this request"), (lambda ids, scores: scores * torch.nan, "NaN")]
)
def test_a_request_that_fails_harms_no_other(llada, processor, why):
    llm = dkv.LLM(llada, max_length=32, max_slots=3 * 32)
    good, bad = llm.add([5, 9], max_new_tokens=6), llm.add([7], max_new_tokens=6, logits_processor=processor)
    while not (good.done and bad.done):
        llm.step()
    assert bad.state == "failed" and why in str(bad.error) and bad.tokens is None
    assert torch.equal(good.tokens, alone(llada, [5, 9], {"max_new_tokens": 6}))
    assert llm.running == 0


def test_drafts_are_told_as_they_fill(llada):
    llm = dkv.LLM(llada, max_length=32, max_slots=32)
    first, second = llm.add([5, 9], max_new_tokens=4), llm.add([7], max_new_tokens=3)
    mask, counts = llada.spec.mask_token_id, []
    while not first.done:
        llm.step()
        draft, other = llm.drafts([first, second])
        counts.append(int((draft == mask).sum()))
        assert torch.equal(draft, llm.draft(first))
        assert second.state == "waiting" and (other == mask).all() and len(other) == 3
        # The tokens before the first mask are settled, and are known without a read.
        assert first.settled == [*draft.tolist(), mask].index(mask)
        assert (first.stats.first_token is not None) == (first.settled > 0)
    assert counts == [3, 2, 1, 0] and first.settled == 4
    llm.cancel(second)
    assert second.done and second.stats.started is None and llm.step() == []


def test_drafts_of_any_requests_come_in_their_order(llada):
    """Running in several batches, waiting, done: each gets its own, and keeps it."""
    llm = dkv.LLM(llada, max_length=32, max_slots=5 * 32)
    requests = [llm.add(prompt, **settings) for prompt, settings in asked(random.Random(3), 9)]
    for _ in range(30):
        llm.step()
        drafts = llm.drafts(requests[::-1])
        before = [draft.clone() for draft in drafts]
        for request, draft in zip(requests[::-1], drafts, strict=True):
            assert draft.dtype == torch.int64 and torch.equal(draft, llm.draft(request))
            assert len(draft) == request.new
        llm.step()
        assert all(map(torch.equal, drafts, before))
    assert all(request.done for request in requests)


def test_what_cannot_be_is_refused_at_once(llada):
    llm = dkv.LLM(llada, max_length=32, max_slots=64, max_waiting=1)
    for prompt, settings, why in (
        ([5] * 20, {"max_new_tokens": 20}, "a prompt of 20 tokens and its answer need 40 slots, and a row has 32"),
        ([64], {}, "input_ids must be in 0..63"),
        ([[5], [6]], {}, r"input_ids must be one prompt, \[P\] or \[1, P\], got \[2, 1\]"),
        ([5], {"output_history": True}, "output_history does not go with requests"),
        ([5], {"steps": 0}, "steps must be"),
    ):
        with pytest.raises((ValueError, IndexError), match=why):
            llm.add(torch.tensor(prompt), **settings)
    for _ in range(3):
        llm.add([5], max_new_tokens=2)
    with pytest.raises(dkv.Full, match="3 requests wait already, and max_waiting is 1"):
        llm.add([5], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"max_slots \(20\) must be at least max_length \(32\)"):
        dkv.LLM(llada, max_length=32, max_slots=20)


def test_rows_are_as_many_as_memory_holds(llada, monkeypatch):
    spec = llada.spec
    a_slot = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    assert memory.slot_bytes(llada) == a_slot
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * a_slot * 100)
    assert memory.slots_that_fit(llada, 32) == 96 and memory.slots_that_fit(llada, 500) == 500
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 50)
    assert dkv.LLM(llada, max_length=32).rows == memory.MOST_ROWS


def test_a_request_that_cannot_start_harms_no_other(llada, monkeypatch):
    """As where a device has no memory for the state of another kind of settings."""

    def short(*given, **how):
        raise RuntimeError("out of memory")

    llm = dkv.LLM(llada, max_length=32, max_slots=2 * 32)
    good = llm.add([5, 9], max_new_tokens=6)
    llm.step()
    monkeypatch.setattr("dkv.serving.sharing.ContinuousBatch", short)
    bad = llm.add([7], max_new_tokens=6, temperature=0.5)
    assert llm.step() == [bad] and bad.state == "failed" and str(bad.error) == "out of memory"
    while not good.done:
        llm.step()
    assert torch.equal(good.tokens, alone(llada, [5, 9], {"max_new_tokens": 6})) and llm.running == 0


def test_new_tokens_are_counted_up_to_an_end_also_in_blocks():
    model = small_model(attention="block", block_length=8)
    llm = dkv.LLM(model, max_length=48, max_slots=2 * 48)
    for prompt in ([5, 9], [7, 3, 20]):
        for end in range(0, 61, 6):
            settings = {"max_new_tokens": 9, "eos_token_id": end}
            (request,) = llm.generate([prompt], progress=False, **settings)
            output = dkv.generate(model, torch.tensor([prompt]), **settings)
            assert request.stats.new_tokens == output.stats.new_tokens


@pytest.mark.parametrize("name", ["llada", "dream", "blocks"])
def test_texts_with_masks_are_filled_as_by_infill_alone(name, request):
    block = {"attention": "block", "block_length": 4}
    model = small_model(**block) if name == "blocks" else request.getfixturevalue(name)
    rng, mask_id = random.Random(2), model.spec.mask_token_id
    calls = [{}, {"cache": "decode"}, {"temperature": 0.7}, {"steps": 3, "eos_token_id": list(range(30))}]
    llm, going, done = dkv.LLM(model, max_length=32, max_slots=3 * 32), {}, {}
    for number in range(16):
        text = [mask_id if rng.random() < 0.4 else rng.randrange(50) for _ in range(rng.randrange(2, 24))]
        # Where nothing is given all slots are alike, and which is surer is nothing but rounding.
        text.append(rng.randrange(50))
        settings = {"seed": number, **rng.choice(calls)}
        going[llm.add(text, infill=True, **settings)] = text, settings
        # Beside prompts that are continued, some of them with masks that stay.
        llm.add(text[:8], max_new_tokens=5, **settings)
    while llm.running or llm.waiting:
        done.update((request, going.pop(request)) for request in llm.step() if request in going)
        for request in list(going)[:2]:
            draft = llm.draft(request).tolist()
            kept = [token for token in going[request][0][: request.settled] if token != mask_id]
            assert len(draft) == len(going[request][0]) and mask_id not in draft[: request.settled]
            assert all(new == old for new, old in zip(draft, going[request][0], strict=True) if old != mask_id), kept
    assert len(done) == 16 and not going
    for request, (text, settings) in done.items():
        assert request.state == "finished", request.error
        filled = dkv.infill(model, torch.tensor([text]), **settings).sequences[0]
        assert torch.equal(request.tokens, filled), (text, settings, request.tokens, filled)
        assert request.stats.new_tokens == text.count(mask_id)


def test_what_infill_refuses_is_refused_of_requests(llada):
    llm = dkv.LLM(llada, max_length=16, max_slots=16, max_new_tokens=12)
    for settings, said in (
        ({"max_new_tokens": 4}, "max_new_tokens does not go with infill"),
        ({"schedule": "speculative"}, "speculative"),
        ({"output_history": True}, "output_history"),
    ):
        with pytest.raises(ValueError, match=said):
            llm.add([1, llada.spec.mask_token_id], infill=True, **settings)
    with pytest.raises(ValueError, match="17"):
        llm.add([1] * 17, infill=True)
    # As many as a row has, whatever the settings of prompts that are continued.
    request = llm.add([1] * 15 + [llada.spec.mask_token_id], infill=True)
    empty = llm.add([1, 2], infill=True)
    assert llm.draft(empty).tolist() == [1, 2]
    while not (request.done and empty.done):
        llm.step()
    assert empty.tokens.tolist() == [1, 2] and request.stats.new_tokens == 1 and empty.stats.new_tokens == 0
