"""How likely each token was in the pass that filled its slot."""

import math
import random

import pytest
import torch

import dkv
from tests.dkv.conftest import small_model
from tests.dkv.serving.loopback import serving


def alone(model, prompt, infill=False, **settings):
    """The tokens that are told, and how likely they were when they were filled."""
    ids, mask_id = torch.tensor([prompt]), model.spec.mask_token_id
    call = dkv.infill if infill else dkv.generate
    output = call(model, ids, output_history=True, output_confidences=True, **settings)
    start, sure = 0 if infill else len(prompt), torch.full_like(output.confidences[0, 0], math.nan)
    before = torch.full_like(output.history[0, 0], mask_id)
    before[: len(prompt)] = ids[0]
    for now, confidences in zip(output.history[:, 0], output.confidences[:, 0], strict=True):
        filled = (before == mask_id) & (now != mask_id)
        sure[filled], before = confidences[filled], now
    return output.sequences[0, start:], sure[start:]


@pytest.mark.parametrize("name", ["llada", "dream", "blocks"])
def test_they_are_those_of_the_pass_that_filled_the_slot(name, request):
    block = {"attention": "block", "block_length": 4}
    model = small_model(**block) if name == "blocks" else request.getfixturevalue(name)
    rng, mask_id, asked = random.Random(4), model.spec.mask_token_id, {}
    llm = dkv.LLM(model, max_length=32, max_slots=3 * 32)
    calls = [{}, {"cache": "decode"}, {"threshold": 0.2, "block_length": 4}, {"confidence": "margin"}]
    for number in range(14):
        prompt, settings = [rng.randrange(50) for _ in range(rng.randrange(2, 9))], dict(calls[number % 3])
        if number % 4 == 3:
            settings["infill"], prompt = True, [*prompt, mask_id, 4, mask_id]
        else:
            settings["max_new_tokens"] = rng.randrange(1, 13)
        asked[llm.add(prompt, logprobs=True, **settings)] = prompt, settings
        # Of the same settings, without them.
        assert llm.add(prompt, **settings).logprobs is None
    while llm.running or llm.waiting:
        llm.step()
    for request, (prompt, settings) in asked.items():
        tokens, sure = alone(model, prompt, **settings)
        assert torch.equal(request.tokens, tokens)
        filled = ~sure.isnan()
        torch.testing.assert_close(request.logprobs[filled], sure[filled], rtol=1e-4, atol=1e-5)
        assert (request.logprobs[filled] <= 0).all()


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.5}, {"confidence": "margin"}, {"confidence": "random"}, {"confidence_eos_eot_inf": True}],
)
def test_where_they_would_be_no_probabilities_they_are_refused(llada, settings):
    with pytest.raises(ValueError, match=f"logprobs need {next(iter(settings))}"):
        dkv.LLM(llada, max_length=16, max_slots=16).add([1, 2], max_new_tokens=4, logprobs=True, **settings)


def test_the_openai_client_is_told_them(talking):
    openai = pytest.importorskip("openai")
    httpx, model, tokenizer = pytest.importorskip("httpx"), *talking
    ids = tokenizer("1+2=")["input_ids"]
    settings = {"cache": "decode", "max_new_tokens": 16, "eos_token_id": [17]}
    tokens, sure = alone(model, ids, **settings)
    count = tokens.tolist().index(17) if 17 in tokens else 16
    texts = [tokenizer.decode([token]) for token in tokens[:count].tolist()]
    with serving(*talking) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        asked = {"model": "tiny", "extra_body": {"cache": "decode"}}
        told = client.completions.create(prompt="1+2=", logprobs=0, **asked).choices[0]
        assert told.logprobs.tokens == texts and told.text == "".join(texts)
        assert told.logprobs.token_logprobs == pytest.approx(sure[:count].tolist(), abs=1e-4)
        assert told.logprobs.text_offset == list(range(count))
        talk = [{"role": "user", "content": "1+2="}]
        content = client.chat.completions.create(messages=talk, logprobs=True, **asked).choices[0].logprobs.content
        assert [one.token for one in content] == texts and content[0].bytes == list(texts[0].encode())
        assert [one.logprob for one in content] == pytest.approx(sure[:count].tolist(), abs=1e-4)
        plain = client.chat.completions.create(messages=talk, logprobs=False, **asked).choices[0]
        assert plain.logprobs is None and plain.message.content == told.text
        cut = client.completions.create(prompt="1+2=", logprobs=0, stop=texts[3], **asked).choices[0]
        assert "".join(cut.logprobs.tokens) == cut.text == told.text[: told.text.index(texts[3])]
        for fields, said in (
            ({"logprobs": 1}, "how likely other tokens were is not kept"),
            ({"logprobs": 0, "stream": True}, "leave stream out"),
            ({"logprobs": 0, "temperature": 1}, "logprobs need temperature=0"),
        ):
            response = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "1+2=", **fields})
            assert response.status_code == 400 and said in response.json()["error"]["message"]
