"""Whole drafts in the pieces of a stream: what stands on the canvas, and what is told of it."""

from types import SimpleNamespace

import pytest

import dkv
from dkv.serving.draft import Drafted, Watch, runs
from dkv.serving.worker import Job
from dkv.tools import trace
from tests.dkv.serving.loopback import alone
from tests.dkv.serving.test_server import CHAT, COMPLETE, events, joined, post, url  # noqa: F401

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

PROMPT = "1+2="


def drafts(found, index=0):
    return [c["dkv"] for e in found for c in e["choices"] if c["index"] == index and "dkv" in c]


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "decode", "refresh": 4},
        {"cache": "dual", "block_length": 8, "threshold": 0.9},
        {"temperature": 1.0, "seed": 7},
    ],
)
def test_the_drafts_are_those_of_a_generation_alone(url, tiny, settings):  # noqa: F811
    model, tokenizer = tiny
    found = events(post(url, prompt=PROMPT, stream=True, draft=True, **settings))
    told, ids = drafts(found), tokenizer(PROMPT, return_tensors="pt").input_ids
    own = {**settings, "cache": dkv.DecodeCache(4)} if "refresh" in settings else settings
    own.pop("refresh", None)
    record = trace.record(model, tokenizer, ids, max_new_tokens=16, eos_token_id=[17], **own)
    assert joined(found) == alone(*tiny, PROMPT, **own)
    filled, ended = {}, told[-1]["stats"]["new_tokens"]
    for draft in told:
        filled |= {slot: (step, text) for slot, step, text in draft["filled"]}
        assert draft["computed"] == runs(record.computed[draft["step"] - 1].tolist())
        assert draft["prompt"] == len(ids[0])
    assert [filled[slot][0] - 1 for slot in range(ended)] == record.decoded[4 : 4 + ended].tolist()
    assert [filled[slot][1] for slot in range(ended)] == list(record.texts[4 : 4 + ended])
    assert told[-1]["step"] == record.passes == told[-1]["stats"]["passes"]
    assert told[-1]["masked"] == 0 and told[-1]["draft"] == joined(found)


def test_a_draft_is_text_with_a_sign_for_every_mask(tiny):
    model, tokenizer = tiny
    watch, drafted = Watch(18), Drafted(tokenizer, model.spec, 4)
    ids = tokenizer("12 34")["input_ids"]
    first = watch.after(1, [ids[0], 18, 18, ids[3], 18], [True] * 9)
    assert drafted.take(first, 1) == {
        "step": 1,
        "draft": "1░░3░",
        "settled": 1,
        "masked": 3,
        "prompt": 4,
        "slots": 5,
        "filled": [[0, 1, "1"], [3, 1, "3"]],
        "computed": [[0, 9]],
    }
    # A reader that is slow misses a step, and still hears when each slot was filled.
    watch.after(2, [ids[0], ids[1], 18, ids[3], 18], [False] * 4 + [True] * 5)
    last = drafted.take(watch.after(3, [*ids[:4], 17], [True, False, True] + [False] * 6), 5)
    assert last["filled"] == [[1, 2, "2"], [2, 3, " "], [4, 3, "<|endoftext|>"]]
    assert (last["draft"], last["computed"], last["masked"]) == ("12 3", [[0, 1], [2, 3]], 0)


def test_the_openai_client_finds_drafts_in_the_extra_of_a_choice(url, tiny):  # noqa: F811
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    extra = {"draft": True, "cache": "decode", "refresh": 4}
    text = alone(*tiny, PROMPT, cache=dkv.DecodeCache(4))
    talk = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "stream": True, "n": 2}
    pieces = list(client.chat.completions.create(**talk, extra_body=extra))
    for index in range(2):
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == text
        found = [choice.model_extra["dkv"] for choice in own if choice.model_extra]
        assert all(draft["draft"].count("░") == draft["masked"] for draft in found) and found[-1]["draft"] == text
    for piece in client.completions.create(model="tiny", prompt=PROMPT, stream=True, extra_body=extra):
        assert piece.choices[0].model_extra["dkv"]["step"]


def test_what_may_be_edited_is_news_as_a_draft_alone():
    # No bundled model edits what is filled.
    for threshold, settled in ((None, 5), (0.9, 0)):
        request = SimpleNamespace(config=dkv.DiffusionConfig(edit_threshold=threshold), settled=5, row=0)
        jobs = [Job([], request.config, print, True, watch, request=request) for watch in (None, Watch(18))]
        assert [job.settled for job in jobs] == [settled] * 2
        assert [job.has_news for job in jobs] == [settled > 0, True]


def test_a_draft_without_a_stream_is_refused(url):  # noqa: F811
    response = post(url, prompt=PROMPT, draft=True)
    assert response.status_code == 400 and response.json()["error"]["param"] == "draft"
    assert "ask for stream as well" in response.json()["error"]["message"]
