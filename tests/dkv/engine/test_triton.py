"""The whole generator on the Triton kernels, in the interpreter: the tokens of the torch backend."""

import pytest
import torch

import dkv
from dkv.kernels.common import backend as kernel_backend

POLICIES = [
    dkv.NoCache(),
    dkv.DecodeCache(refresh=3),
    dkv.DecodeCache(refresh=4, warmup=1),
    dkv.PrefillCache(),
    dkv.PrefillDecodeCache(refresh=3),
    dkv.GreedyCache(refresh=3, window=2),
    dkv.PrefixCache(),
    dkv.DualCache(delayed=True),
    dkv.Rollout(0.3, 3, 4.0),
    dkv.SkipCache("1/2@0", block_every=3),
]


@pytest.fixture(autouse=True)
def interpreted():
    if not kernel_backend.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")


def rows(padded):
    return padded([[5, 9, 11], [7, 3, 21, 40, 2, 8]])


def same_tokens(model, ids, mask=None, **settings) -> None:
    outputs = {}
    for backend in ("torch", "triton"):
        with dkv.use_backend(backend):
            outputs[backend] = dkv.generate(model, ids, mask, output_history=True, **settings)
    assert torch.equal(outputs["triton"].sequences, outputs["torch"].sequences)
    for own, other in zip(outputs["triton"].history, outputs["torch"].history, strict=True):
        assert torch.equal(own, other)


# A program of the interpreter takes milliseconds: one family sees every policy, the other each kind of pass.
@pytest.mark.parametrize(
    ("family", "policy"),
    [("dream", policy) for policy in POLICIES] + [("llada", policy) for policy in (POLICIES[0], *POLICIES[2::5])],
    ids=str,
)
def test_every_policy(request, family, policy, padded):
    ids, mask = rows(padded)
    greedy = isinstance(policy, dkv.GreedyCache)
    same_tokens(
        request.getfixturevalue(family), ids, mask, max_new_tokens=5, block_length=3, cache=policy, seed=1,
        confidence="random" if greedy else "probability",
    )  # fmt: skip


@pytest.mark.parametrize("confidence", ["margin", "entropy"])
def test_other_confidences_with_noise(dream, confidence, padded):
    ids, mask = rows(padded)
    same_tokens(
        dream, ids, mask, max_new_tokens=6, steps=3, confidence=confidence, temperature=0.8, seed=3,
        cache=dkv.DecodeCache(refresh=2),
    )  # fmt: skip


@pytest.mark.parametrize("policy", [dkv.DecodeCache(refresh=2), dkv.DualCache(), dkv.SuffixWindow(1)], ids=str)
def test_ragged_rows(dream, policy, padded):
    """Rows of different budgets and steps: full and cached passes of different lengths at once."""
    ids, mask = rows(padded)
    decay = 0.5 if isinstance(policy, dkv.SuffixWindow) else 0
    call = {"max_new_tokens": [3, 8], "block_length": 3, "threshold": 0.2, "threshold_decay": decay}
    same_tokens(dream, ids, mask, cache=policy, **call)


@pytest.mark.parametrize(
    "rule",
    [
        {"entropy_bound": 3.0},
        pytest.param({"entropy_bound": 3.0, "entropy_form": "code"}, marks=pytest.mark.slow),
        pytest.param({"threshold": 0.3, "near_threshold": 0.2, "radius": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rules_that_look_at_several_slots(llada, rule, padded):
    ids, mask = rows(padded)
    cache = dkv.GreedyCache(refresh=3, window=1) if "entropy_form" in rule else dkv.DualCache()
    same_tokens(llada, ids, mask, max_new_tokens=[3, 5], block_length=4, cache=cache, **rule)


def test_a_region_that_slides(dream, padded):
    ids, mask = rows(padded)
    call = {"schedule": "sliding", "block_length": 2, "most": 3, "threshold": 0.2, "cache": dkv.SlidingCache(1)}
    same_tokens(dream, ids, mask, max_new_tokens=[3, 6], **call)


def test_guidance(llada, padded):
    ids, mask = rows(padded)
    same_tokens(llada, ids, mask, max_new_tokens=[2, 4], cfg_scale=1.0, cache=dkv.DecodeCache(refresh=2))


def test_filters_of_the_sampling(dream, padded):
    ids, mask = rows(padded)
    same_tokens(dream, ids, mask, max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=9, seed=2, cache="decode")


def test_normed_heads_and_bfloat16(build, padded):
    """q and k norms, grouped heads; bfloat16 is computed in float32 here, so close calls may differ from torch."""
    model = build(qk_norm=True, num_kv_heads=1)
    ids, mask = rows(padded)
    same_tokens(model, ids, mask, max_new_tokens=4, cache=dkv.DecodeCache(refresh=2))
    with dkv.use_backend("triton"):
        output = dkv.generate(model.to(torch.bfloat16), ids, mask, max_new_tokens=4, cache=dkv.DecodeCache(refresh=2))
    assert (output.sequences[:, -4:] != model.spec.mask_token_id).all()
