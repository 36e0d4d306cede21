"""Requests that mean no good, or nothing: none brings the server down, and none sees what others say."""

import asyncio
import json
import random
import socket
import time

import pytest

from dkv.serving import server
from dkv.serving.protocol import CONTINUED, INERT, OWN, SETTINGS
from tests.dkv.serving.loopback import alone, serving, until

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

NAMES = (*CONTINUED, *OWN[True], *OWN[False], *SETTINGS, *INERT, "marker", "", "__class__", "x" * 300, "self", "\x00")
VALUES = (
    *(None, True, False, 0, 1, 2, -1, 0.5, 1.0, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**30),
    *("", "1", "1+2=", "none", "dual", "decode", "time", "\x00", "\n", "[MASK:", "{{7*7}}", "x" * 500),
    *([], {}, [[]], [None], [1], [0, 1], [-1], [1e9], ["1"], ["1+2=", "1"], [[1], [2]], {"a": {}}, [{}] * 3),
    [{"role": "user", "content": "1+2="}],
    [{"role": "user", "content": [{"type": "text", "text": "1"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}],
    [{"role": [], "content": {}}],
    {"include_usage": True},
    *("[MASK]", "1[MASK:3]", ["[MASK:99999999999]"], ["1[MASK]", "[MASK:2]1"], "[MASK:" * 500, "[MASK]1" * 300),
)
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/infill")
KINDS = (
    "application/json",
    "application/json; charset=utf-8",
    "text/plain",
    "multipart/form-data; boundary=x",
    "",
    "application/json/x",
)
# Its answer is not empty, and has signs that no error has.
SECRET = "#..##.#...#.##..#.#....##.#="


def hostile(draw: random.Random) -> dict:
    """The arguments of a request."""
    fields = {"model": "tiny", "prompt": "1+2=", "max_tokens": draw.randint(1, 8)}
    path = draw.choice(PATHS)
    if path == PATHS[1]:
        fields["messages"] = [{"role": "user", "content": fields.pop("prompt")}]
    elif path == PATHS[2]:
        fields = {"model": "tiny", "prompt": "1[MASK:3]2"}
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        fields[draw.choice(NAMES)] = draw.choice(VALUES)
    body = json.dumps(fields).encode()
    way = draw.random()
    if way < 0.1:
        body = body[: draw.randrange(len(body))]
    elif way < 0.2:
        at = draw.randrange(len(body))
        body = body[:at] + draw.randbytes(draw.randint(1, 4)) + body[at + draw.randint(0, 4) :]
    elif way < 0.25:
        body = draw.randbytes(draw.randint(0, 200))
    elif way < 0.27:
        body = draw.choice((b"[" * 4000, b'{"a":' * 700, b"9" * 4000, b'{"n": 1e999}', b"\xff\xfe{}", b"x" * 6000))
    kind = draw.choice(KINDS) if draw.random() < 0.05 else KINDS[0]
    method = draw.choice(("GET", "PUT", "DELETE", "OPTIONS", "PATCH")) if draw.random() < 0.03 else "POST"
    return {"method": method, "url": path, "content": body, "headers": {"Content-Type": kind}}


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_whatever_is_sent_gets_an_answer_or_a_reason(talking, count):
    draw = random.Random(count)
    requests = [hostile(draw) for _ in range(count)]
    secret = alone(*talking, SECRET)

    async def attack(url):
        limits = httpx.Limits(max_connections=16)
        # They wait for each other, as long as it takes.
        timeout = httpx.Timeout(120, pool=None)
        async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:

            async def honest():
                said = {"model": "tiny", "prompt": SECRET}
                return await client.post(PATHS[0], json=said)

            every = [client.request(**request) for request in requests]
            honests = [honest() for _ in range(count // 50)]
            return await asyncio.gather(*every), await asyncio.gather(*honests)

    with serving(*talking, max_waiting=64) as (url, worker):
        found, honest = asyncio.run(attack(url))
        until(lambda: not worker.open)
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        assert worker.llm.running == worker.llm.waiting == 0
    assert {response.status_code for response in honest} == {200}
    assert {response.json()["choices"][0]["text"] for response in honest} == {secret}
    for request, response in zip(requests, found, strict=True):
        status = response.status_code
        assert status < 500 or status == 503, (request, response.text)
        assert SECRET not in response.text and secret not in response.text and "Traceback" not in response.text
        if status >= 400:
            error = response.json()["error"]
            assert error["message"] and set(error) == {"message", "type", "param", "code"}
    # Some were no attacks.
    assert 0.1 < sum(response.status_code == 200 for response in found) / count < 0.9


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def request_of(**fields) -> bytes:
    body = json.dumps({"model": "tiny", "prompt": "1+2=", **fields}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read(stream: socket.socket) -> bytes:
    return b"".join(iter(lambda: stream.recv(1 << 16), b""))


def test_who_does_not_read_keeps_nobody_waiting_and_finds_everything_later(tiny):
    with serving(*tiny, rows=1) as (url, worker):
        readers = [connected(url) for _ in range(8)]
        for reader in readers:
            reader.sendall(request_of(stream=True, max_tokens=40))
        body = {"model": "tiny", "prompt": "1+2="}
        assert httpx.post(url + PATHS[0], json=body, timeout=60).json()["choices"][0]["text"] == alone(*tiny, "1+2=")
        until(lambda: not worker.open)
        want = alone(*tiny, "1+2=", max_new_tokens=40)
        for reader in readers:
            text = read(reader).decode()
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert "".join(event["choices"][0]["text"] for event in events) == want and "[DONE]" in text
            reader.close()


def test_a_body_that_does_not_come_is_not_waited_for(tiny, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    with serving(*tiny) as (url, _), connected(url) as stream:
        stream.sendall(request_of()[:-10])
        answer = read(stream)
        assert b" 408 " in answer.splitlines()[0] and b"has not come within" in answer


def test_what_takes_longer_than_the_time_to_drain_is_let_go(tiny, monkeypatch):
    with serving(*tiny, drain_seconds=0.3) as (url, worker):
        step = worker.llm.step
        monkeypatch.setattr(worker.llm, "step", lambda: (time.sleep(0.1), step())[1])
        with connected(url) as stream:
            stream.sendall(request_of(stream=True, max_tokens=60))
            until(lambda: worker.llm.running)
    assert not worker.open and worker.llm.running == 0
