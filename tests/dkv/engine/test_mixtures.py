"""Models with experts in the engine: LLaDA-MoE in the loop of LLaDA."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dkv

FOLDER = Path(__file__).parents[2] / "golden" / "families" / "llada_moe" / "llada_moe_tiny"
CASES = sorted(FOLDER.glob("cases/p*.json"))


@pytest.fixture(scope="module", params=[None, False], ids=["packed", "plain"])
def model(request):
    return dkv.load(FOLDER, device="cpu", pack=request.param)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_recorded_runs(model, path):
    settings, recorded = json.loads(path.read_text())["settings"], load_file(path.with_suffix(".safetensors"))
    length = settings["prompt_length"]
    output = dkv.generate(
        model,
        recorded["prompt"].long(),
        max_new_tokens=settings["gen_length"],
        block_length=settings["block_length"],
        steps=settings["steps"],
        cache=dkv.NoCache(),
        eos_token_id=None,
    )
    assert output.sequences[0, length:].tolist() == recorded["final"][0, length:].tolist()


@pytest.mark.parametrize("cache", [dkv.NoCache(), dkv.DecodeCache(4)], ids=["none", "decode"])
def test_a_batch_gives_what_each_text_gives_alone(model, cache):
    prompts = torch.randint(0, 180, (3, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 16, "block_length": 8, "steps": 16, "cache": cache}
    together = dkv.generate(model, prompts, **settings).sequences
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(dkv.generate(model, prompt[None], **settings).sequences[0], row)
