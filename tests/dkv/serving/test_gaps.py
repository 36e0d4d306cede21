"""`/v1/infill`: the texts of `dkv.infill`, and what cannot be filled."""

import time

import pytest
import torch

import dkv
from dkv.tools.marked import marked
from tests.dkv.serving.loopback import alone, serving, until

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

TEXT = "+1 +2 -3 +1=51 53 [MASK:5] 49[MASK][MASK]55 5"


@pytest.fixture(scope="module")
def url(tiny):
    with serving(*tiny) as (url, _):
        yield url


def post(url, path="/v1/infill", **fields):
    return httpx.post(url + path, json={"model": "tiny", **fields}, timeout=60)


def filled(model, tokenizer, text, marker="[MASK]", **settings):
    """The gaps that `dkv.infill` fills alone, and the text around them."""
    ids, gaps, cut = [], [], marked(text, marker)
    for part in cut.tokens(tokenizer):
        if isinstance(part, dkv.Gap):
            gaps.append(slice(len(ids), len(ids) + part.most))
        ids += [18] * part.most if isinstance(part, dkv.Gap) else [part]
    row = dkv.infill(model, torch.tensor([ids]), **settings).sequences[0].tolist()
    return [tokenizer.decode(row[gap], skip_special_tokens=True) for gap in gaps], cut


@pytest.mark.parametrize(
    "settings", [{}, {"cache": "decode"}, {"cache": "dual", "block_length": 4}, {"temperature": 1.0, "seed": 3}]
)
def test_gaps_are_filled_as_by_infill_alone(url, tiny, settings):
    prompts = [TEXT, "1[MASK]2", TEXT]
    answer = post(url, prompt=prompts, **settings).json()
    assert answer["object"] == "infill" and answer["id"].startswith("infill-")
    for number, (choice, text) in enumerate(zip(answer["choices"], prompts, strict=True)):
        own = {**settings, "seed": 3 + number} if "seed" in settings else settings
        gaps, cut = filled(*tiny, text, **own)
        assert choice["gaps"] == gaps and choice["text"] == cut.joined(gaps)
        assert (choice["index"], choice["finish_reason"]) == (number, "stop")
    given = sum(len(text.replace("[MASK:5]", "").replace("[MASK]", "")) for text in prompts)
    assert answer["usage"] == {"prompt_tokens": given, "completion_tokens": 15, "total_tokens": given + 15}


def test_gaps_stand_beside_answers_and_seeds_follow_each_other(url, tiny):
    answer = post(url, prompt="1+#=##", marker="#", n=3, seed=5, temperature=1).json()
    for number, choice in enumerate(answer["choices"]):
        gaps, cut = filled(*tiny, "1+#=##", "#", seed=5 + number, temperature=1.0)
        assert (choice["gaps"], choice["text"]) == (gaps, cut.joined(gaps))
    assert post(url, "/v1/completions", prompt="1+2=").json()["choices"][0]["text"] == alone(*tiny, "1+2=")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"prompt": "1+2"}, "prompt", "there is no [MASK] in it"),
        ({"prompt": "[MASK:0]"}, "prompt", "write [MASK] for one token"),
        ({"prompt": "1[MASK:64]"}, "prompt", "65 tokens with its gaps is longer than the 64"),
        ({"prompt": "[MASK:999999999999999]"}, "prompt", "longer than the 64"),
        ({"prompt": "ä[MASK]"}, "prompt", "no token for 'ä'"),
        ({"prompt": [1, 2]}, "prompt", "a text with gaps"),
        ({"prompt": []}, "prompt", "a text with gaps"),
        ({"prompt": ["[MASK]"] * 3, "n": 2}, "prompt", "more than 4 answers"),
        ({"marker": ""}, "marker", "1 to 64 characters"),
        ({"stream": True}, "stream", "told when all are filled"),
        ({"stop": "1"}, "stop", "unknown field"),
        ({"max_tokens": 4}, "max_tokens", "unknown field"),
        ({"schedule": "speculative"}, None, "speculative"),
        ({"edit_threshold": 0.5}, None, "edit_threshold"),
        ({"model": "other"}, "model", "this server has 'tiny'"),
    ],
)
def test_what_cannot_be_filled_is_told_in_openais_form(url, fields, param, said):
    response = post(url, **{"prompt": "1[MASK]2", **fields})
    assert response.status_code == (404 if param == "model" else 400), response.text
    error = response.json()["error"]
    assert error["param"] == param and said in error["message"] and "--" not in error["message"]


def test_a_key_is_asked_for_and_a_client_that_leaves_cancels(tiny, monkeypatch):
    with serving(*tiny, api_key="secret", rows=1) as (url, worker):
        assert post(url, prompt="[MASK]").status_code == 401
        step = worker.llm.step
        monkeypatch.setattr(worker.llm, "step", lambda: (time.sleep(0.2), step())[1])
        headers, body = {"Authorization": "Bearer secret"}, {"model": "tiny", "prompt": "1[MASK:40]", "n": 2}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/infill", json=body, headers=headers, timeout=0.5)
        until(lambda: not worker.open)
        assert worker.llm.running == worker.llm.waiting == 0
