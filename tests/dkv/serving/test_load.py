"""Many clients at once, who come and go; and what the server counts of them."""

import asyncio
import random
import re

import pytest

import dkv
from tests.dkv.serving.loopback import PROMPTS, alone, serving, until
from tests.dkv.serving.test_server import joined

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CLIENTS, ROWS = 64, 16
# As clients say them, and as `dkv.generate` does.
SETTINGS = (
    ({}, {}),
    ({"cache": "decode", "refresh": 4}, {"cache": dkv.DecodeCache(4)}),
    ({"cache": "dual", "block_length": 8, "threshold": 0.9},) * 2,
    ({"temperature": 1.0, "seed": 3, "top_p": 0.9},) * 2,
)


class Texts:
    """What each request gets alone; computed once."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.known = model, tokenizer, {}

    def of(self, prompt, new, kind):
        key = prompt, new, kind
        if key not in self.known:
            own = SETTINGS[kind][1]
            self.known[key] = alone(self.model, self.tokenizer, prompt, max_new_tokens=new, **own)
        return self.known[key]


async def client(http, draw, count, texts):
    """So many requests one after the other; returns how many were answered, each as alone, and how many left."""
    answered = left = 0
    for _ in range(count):
        prompt, new, kind = draw.choice(PROMPTS[:4]), draw.choice((5, 11)), draw.randrange(len(SETTINGS))
        stream, leaves = draw.random() < 0.3, draw.random() < 0.1
        body = {"model": "tiny", "prompt": prompt, "max_tokens": new, "stream": stream, **SETTINGS[kind][0]}
        try:
            response = await http.post(
                "/v1/completions", json=body, timeout=draw.uniform(0.001, 0.1) if leaves else 120
            )
        except httpx.TimeoutException:
            assert leaves
            left += 1
            continue
        assert response.status_code == 200, response.text
        if stream:
            text = joined(
                [httpx.Response(200, text=line[6:]).json() for line in response.text.splitlines() if line[6:7] == "{"]
            )
        else:
            text = response.json()["choices"][0]["text"]
        assert text == texts.of(prompt, new, kind), body
        answered += 1
    return answered, left


@pytest.mark.parametrize("count", [128, pytest.param(10_000, marks=pytest.mark.slow)])
def test_clients_who_come_and_go_get_what_each_gets_alone(tiny, count):
    texts, each = Texts(*tiny), -(-count // CLIENTS)

    async def crowd(url):
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, limits=limits) as http:
            return await asyncio.gather(*(client(http, random.Random(n), each, texts) for n in range(CLIENTS)))

    with serving(*tiny, rows=ROWS, max_waiting=2 * CLIENTS) as (url, worker):
        found = asyncio.run(crowd(url))
        until(lambda: not worker.open)
        told = httpx.get(f"{url}/metrics")
        assert worker.llm.running == worker.llm.waiting == 0
    answered, left = (sum(numbers) for numbers in zip(*found, strict=True))
    assert answered + left == each * CLIENTS and left
    counts = counted(told.text)
    # One that left may have been answered all the same, while it did.
    assert answered <= counts['dkv_choices_total{state="finished"}'] <= answered + left
    assert counts["dkv_answer_seconds_count"] == counts['dkv_choices_total{state="finished"}']
    assert counts["dkv_rows"] == ROWS and counts["dkv_rows_busy"] == counts["dkv_open"] == 0


def counted(text: str) -> dict[str, float]:
    """The samples that Prometheus would read."""
    lines = (re.fullmatch(r"(\S+?(?:{[^}]*})?) (\S+)", line) for line in text.splitlines() if line[:1] != "#")
    return {line[1]: float(line[2]) for line in lines}


def test_the_counts_are_of_what_was_asked_and_hold_no_text(tiny):
    with serving(*tiny, api_key="secret") as (url, worker):
        headers = {"Authorization": "Bearer secret"}
        body = {"model": "tiny", "prompt": "1+2=", "max_tokens": 12, "n": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={**body, "n": 0}, headers=headers).status_code == 400
        assert httpx.get(f"{url}/v1/models/1+2=", headers=headers).status_code == 404
        until(lambda: not worker.open)
        # No key is asked for, as of /health.
        response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = counted(response.text)
    assert found["dkv_prompt_tokens_total"] == 8 and 0 < found["dkv_generated_tokens_total"] <= 24
    assert found["dkv_first_token_seconds_count"] == found["dkv_queue_seconds_count"] == 2
    for status, count in (("200", 1), ("400", 1)):
        assert found[f'dkv_http_responses_total{{route="/v1/completions",status="{status}"}}'] == count
    assert found['dkv_http_responses_total{route="/v1/models/{name:path}",status="404"}'] == 1
    assert "1+2=" not in response.text
