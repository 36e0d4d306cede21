"""The server on the loopback: answers equal to those of `dkv.generate` alone, errors, limits, clients that leave."""

import asyncio
import json
import logging
import threading

import pytest

import dkv
from tests.dkv.serving.loopback import PROMPTS, alone, serving, until

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def url(talking):
    with serving(*talking) as (url, _):
        yield url


def post(url, path=COMPLETE, **fields):
    return httpx.post(url + path, json={"model": "tiny", **fields}, timeout=60)


def events(response) -> list[dict]:
    """The events of an answer in pieces, without the last."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" and response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line) for line in lines[:-1]]


def joined(found: list[dict], chat: bool = False, index: int = 0) -> str:
    choices = [c for e in found for c in e["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)


def test_sixteen_clients_at_once_get_what_each_gets_alone(url, tiny):
    settings = [
        {"cache": "decode", "refresh": 4},
        {"cache": "dual", "block_length": 8, "threshold": 0.9},
        {"temperature": 1.0, "seed": 7},
        {},
    ]

    async def ask():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            bodies = [
                {"model": "tiny", "prompt": p, "max_tokens": 8 + 3 * (n % 5), "stream": n % 3 == 0, **settings[n % 4]}
                for n, p in enumerate(PROMPTS)
            ]
            return bodies, await asyncio.gather(*(client.post(COMPLETE, json=body) for body in bodies))

    bodies, responses = asyncio.run(ask())
    for number, (body, response) in enumerate(zip(bodies, responses, strict=True)):
        assert response.status_code == 200, response.text
        text = joined(events(response)) if body["stream"] else response.json()["choices"][0]["text"]
        own = {0: {"cache": dkv.DecodeCache(4)}}.get(number % 4, settings[number % 4])
        assert text == alone(*tiny, body["prompt"], max_new_tokens=body["max_tokens"], **own)


def test_a_talk_in_pieces_joins_to_the_whole_one(url, tiny):
    messages = [{"role": "system", "content": "1+"}, {"role": "user", "content": [{"type": "text", "text": "2="}]}]
    whole = post(url, CHAT, messages=messages, n=2, seed=5, temperature=1).json()
    found = events(
        post(
            url,
            CHAT,
            messages=messages,
            n=2,
            seed=5,
            temperature=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for choice in whole["choices"]:
        index = choice["index"]
        text = choice["message"]["content"]
        assert text == joined(found, True, index) == alone(*tiny, "1+2=", temperature=1.0, seed=5 + index)
        ends = [c["finish_reason"] for e in found for c in e["choices"] if c["index"] == index and c["finish_reason"]]
        assert ends == [choice["finish_reason"]]
    assert found[-1]["choices"] == [] and found[-1]["usage"] == whole["usage"]
    assert whole["usage"]["prompt_tokens"] == 4 and whole["object"] == "chat.completion"
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_prompts_may_be_several_and_ids(url, tiny):
    ids = tiny[1]("1+1=")["input_ids"]
    several = post(url, prompt=["1+2=", "1+1="], n=2).json()
    texts = [choice["text"] for choice in several["choices"]]
    assert texts == [alone(*tiny, p) for p in ("1+2=", "1+2=", "1+1=", "1+1=")]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"]["prompt_tokens"] == 8
    assert post(url, prompt=ids).json()["choices"][0]["text"] == texts[2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_in_front_of_it(url, tiny, stream):
    text = alone(*tiny, "1+2=")
    stop = text[5:7]
    response = post(url, prompt="1+2=", stop=[stop, "never"], stream=stream)
    found = events(response) if stream else [response.json()]
    assert joined(found) == text[: text.index(stop)]
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_openai_client_takes_what_it_gets(url, tiny):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "dkv"
    text = alone(*tiny, "1+2=", cache=dkv.DecodeCache(4))
    extra = {"cache": "decode", "refresh": 4}
    assert client.completions.create(model="tiny", prompt="1+2=", extra_body=extra).choices[0].text == text
    talk = {"model": "tiny", "messages": [{"role": "user", "content": "1+2="}], "extra_body": extra}
    assert client.chat.completions.create(**talk).choices[0].message.content == text
    pieces = client.chat.completions.create(**talk, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    with pytest.raises(openai.BadRequestError, match="block_lenth") as raised:
        client.completions.create(model="tiny", prompt="1", extra_body={"block_lenth": 4})
    assert raised.value.param == "block_lenth" and raised.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"model": "other"}, 404, "model", "this server has 'tiny'"),
        ({"colour": 1}, 400, "colour", "unknown field 'colour'"),
        ({"refesh": 1}, 400, "refesh", "did you mean 'refresh'?"),
        ({"output_logits": True}, 400, "output_logits", "unknown field"),
        ({"eos_token_id": 3}, 400, "eos_token_id", "unknown field"),
        ({"presence_penalty": 1}, 400, "presence_penalty", "not supported"),
        ({"prompt": ""}, 200, None, ""),
        ({"prompt": "1" * 60}, 400, "max_tokens", "60 tokens and 16 new ones are 76, and this server takes at most 64"),
        ({"max_tokens": 65}, 400, "max_tokens", "from 1 to 64, got 65"),
        ({"n": 5}, 400, "n", "from 1 to 4, got 5"),
        ({"n": True}, 400, "n", "got True"),
        ({"prompt": ["1"] * 3, "n": 2}, 400, "prompt", "3 prompts with n 2 are more than 4 answers"),
        ({"prompt": "ä"}, 400, "prompt", "no token for 'ä'"),
        ({"prompt": "\ud800"}, 400, None, "strings must be text"),
        ({"prompt": [1, 10**9]}, 400, "prompt", "ids must be below"),
        ({"prompt": {"a": 1}}, 400, "prompt", "prompt must be"),
        ({"prompt": "1" * 5000}, 413, None, "more than 4096 bytes"),
        ({"stop": ["1"] * 5}, 400, "stop", "at most 4"),
        ({"stop": [""]}, 400, "stop", "1 to 256 characters"),
        ({"stream": 1}, 400, "stream", "true or false"),
        ({"seed": [1, 2]}, 400, "seed", "one number"),
        ({"temperature": "hot"}, 400, None, "temperature"),
        ({"cache": "dula"}, 400, None, "did you mean 'dual'?"),
        ({"cache": "sliding"}, 400, None, "sliding"),
        ({"schedule": "speculative"}, 400, None, "speculative"),
        ({"steps": 10**6, "schedule": "time"}, 400, None, "steps"),
        ({"steps": 500, "schedule": "time", "max_tokens": 8}, 400, None, "steps"),
        ({"threshold": None, "user": "x", "top_p": 1, "logprobs": False}, 200, None, ""),
    ],
)
def test_what_cannot_be_answered_is_told_in_openais_form(url, fields, status, param, said):
    body = json.dumps({"model": "tiny", "prompt": "1+2=", **fields})
    response = httpx.post(url + COMPLETE, content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
        assert said in error["message"]
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"n": NaN}', b"\xff", b"[" * 4000, b'{"n": ' + b"9" * 4000])
def test_a_body_that_is_no_json_object_is_refused(url, body):
    response = httpx.post(url + COMPLETE, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and "the body must be" in response.json()["error"]["message"]


def test_other_paths_methods_and_kinds_of_body_are_refused_in_the_same_form(url):
    for response, status in (
        (httpx.get(f"{url}/v1/embeddings"), 404),
        (httpx.get(url + COMPLETE), 405),
        (httpx.post(url + COMPLETE, data={"model": "tiny"}), 415),
    ):
        assert response.status_code == status and response.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [None, [], "1", [1], [{"role": "user"}], [{"role": "tool", "content": "1"}], [{"role": "user", "content": [1]}]],
)
def test_messages_that_are_none_are_refused(url, messages):
    response = post(url, CHAT, messages=messages)
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"


def test_without_a_chat_template_a_talk_is_refused_and_without_the_key_all(tiny):
    talk = {"model": "tiny", "messages": [{"role": "user", "content": "1+2="}]}
    with serving(*tiny, api_key="secret") as (url, _):
        headers = {"Authorization": "Bearer secret"}
        response = httpx.post(url + CHAT, json=talk, headers=headers)
        assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": b"Bearer secret\xe4"}):
            for response in (httpx.get(f"{url}/v1/models", headers=wrong), httpx.post(url + CHAT, headers=wrong)):
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"


class Slow:
    """Holds the steps of a worker until it is let go."""

    def __init__(self, worker, monkeypatch):
        self.go, step = threading.Event(), worker.llm.step
        monkeypatch.setattr(worker.llm, "step", lambda: (self.go.wait(30), step())[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(tiny, monkeypatch, stream):
    with serving(*tiny, rows=1) as (url, worker):
        slow = Slow(worker, monkeypatch)
        body = {"model": "tiny", "prompt": "1+2=", "max_tokens": 60, "n": 3, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + COMPLETE, json=body, timeout=0.3)
        assert worker.open == 3
        slow.go.set()
        until(lambda: not worker.open)
        assert worker.llm.running == worker.llm.waiting == 0
        assert post(url, prompt="1+2=").json()["choices"][0]["text"] == alone(*tiny, "1+2=")


def test_more_than_there_is_room_for_is_told_to_come_again(tiny, monkeypatch):
    with serving(*tiny, rows=1, max_waiting=1) as (url, worker):
        slow = Slow(worker, monkeypatch)
        with pytest.raises(httpx.ReadTimeout):
            post_for(url, 0.3, n=2)
        response = post(url, prompt="1+2=")
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
        slow.go.set()
        until(lambda: not worker.open)
        assert post(url, prompt="1+2=", n=2).status_code == 200


def post_for(url, seconds, **fields):
    return httpx.post(url + COMPLETE, json={"model": "tiny", "prompt": "1+2=", **fields}, timeout=seconds)


def test_a_model_that_fails_is_told_without_traceback_or_prompt(tiny, monkeypatch, caplog):
    prompt = "1" + "+2="
    with serving(*tiny) as (url, worker), caplog.at_level(logging.DEBUG, "dkv"):

        def broken():
            raise RuntimeError(f"the prompt was {prompt}")

        monkeypatch.setattr(worker.llm, "step", broken)
        failed, later = post(url, prompt=prompt), post(url, prompt=prompt)
        assert (failed.status_code, later.status_code) == (500, 503)
        assert "RuntimeError" not in failed.text and failed.json()["error"]["type"] == "server_error"
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
    ours = [record.getMessage() for record in caplog.records if record.name == "dkv.serving"]
    assert "RuntimeError" in ours[0] and not [said for said in ours if prompt in said]
