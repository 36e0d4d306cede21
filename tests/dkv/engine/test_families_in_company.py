"""Small models in the formats of published ones: with every policy that goes with them, a row gets in a ragged batch
what it gets alone.

The product of a mixture may add in another order for another number of tokens. So where two experts score nearly the
same for a token, another one may be chosen in company; the prompts here have no such tie that reaches a token.
"""

import functools
import random

import pytest
import torch

import dkv
from dkv.policies import POLICIES
from tests.dkv.conftest import GOLDEN, pad_rows
from tests.kernels.sweeps import sweep

FULL = ["a2d/a2d_qwen3_tied", "a2d/a2d_qwen2", "llada_moe/llada_moe_tiny"]
IN_BLOCKS = ["sdar/sdar_moe_tiny", "llada2/llada2_tiny"]
# Windows that are small enough for these texts.
OPTIONS = {
    "decode": {"refresh": 4},
    "pd": {"refresh": 4},
    "greedy": {"refresh": 4, "window": 2},
    "suffix": {"window": 3},
    "sliding": {"prefix_window": 2},
    "rollout": {"rollout_p": 0.2, "current_k": 3},
    "elastic": {"window": 3, "gamma": 0.9},
    "skip": {"shares": "1/2@1/3", "block_every": 3},
}
SETTINGS = [
    {"steps": 12},
    {"threshold": 0.05},
    {"confidence": "entropy"},
    {"temperature": 0.7, "seed": [5, 6, 7]},
    {"cfg_scale": 0.5},
    {"eos_token_id": [7, 9, 11, 30, 80], "pad_token_id": 0},
]
# Models with blocks refuse guidance.
UNGUIDED = [{}, *(settings for settings in SETTINGS if "cfg_scale" not in settings)]
BUDGETS = [14, 9, 12]


@pytest.fixture(scope="module")
def loaded():
    return functools.cache(lambda folder: dkv.load(GOLDEN / "families" / folder, device="cpu"))


def prompts_of(seed: int) -> list[list[int]]:
    """Three prompts of 4, 7 and 1 tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(150) for _ in range(length)] for length in (4, 7, 1)]


def check_rows(model, prompts, **call):
    """Tokens and computed slots of a batch are those of its rows; returns its output."""
    ids, mask = pad_rows(prompts)
    seeds = call.pop("seed", [3] * len(prompts))
    output = dkv.generate(model, ids, mask, max_new_tokens=BUDGETS, seed=seeds, output_active=True, **call)
    for row, (prompt, new) in enumerate(zip(prompts, BUDGETS, strict=True)):
        text, columns = torch.tensor([prompt]), slice(ids.shape[1] - len(prompt), ids.shape[1] + new)
        alone = dkv.generate(model, text, max_new_tokens=new, seed=seeds[row], output_active=True, **call)
        found = output.sequences[row, columns]
        assert torch.equal(found, alone.sequences[0]) and not (found == model.spec.mask_token_id).any()
        assert torch.equal(output.active[: len(alone.active), row, columns], alone.active[:, 0])
    return output


def policy_call(name: str) -> dict:
    slides = {"schedule": "sliding"} if name == "sliding" else {}
    return {"cache": {"name": name, **OPTIONS.get(name, {})}, "block_length": 6, **slides}


@pytest.mark.parametrize("folder", FULL)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy(loaded, folder, name):
    stats = check_rows(loaded(folder), prompts_of(0), **policy_call(name)).stats
    # A slot that stops inside the network has been computed.
    assert stats.computed_share < 1 or name in ("none", "skip")


@pytest.mark.slow
@pytest.mark.parametrize("folder", FULL)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_broadly(loaded, folder, name, settings):
    for seed in (1, 2):
        check_rows(loaded(folder), prompts_of(seed), **policy_call(name), **settings)


@pytest.mark.parametrize("folder", IN_BLOCKS)
@pytest.mark.parametrize(("cache", "settings"), sweep(["none", "decode"], UNGUIDED, quick=4))
def test_mixtures_with_blocks(loaded, folder, cache, settings):
    model = loaded(folder)
    blocks = {} if model.spec.block_length else {"block_length": 8}
    check_rows(model, prompts_of(0), cache=cache, **blocks, **settings)
