"""Generations with weights of 8 and 4 bits, as on a GPU: the tokens of the plain model that has the rounded weights."""

import copy

import pytest
import torch

import dkv
from dkv.kernels.common import backend as kernel_backend
from dkv.models.mixture import Mixture
from dkv.models.weight_only import BITS, WeightOnly, weight_only_
from dkv.policies import POLICIES
from tests.dkv.conftest import GOLDEN, pad_rows, small_model
from tests.dkv.engine.test_graphs import taped as taped  # a fixture
from tests.kernels.sweeps import sweep

MIXTURE = Mixture(8, 2, 32, score="sigmoid", bias="choice", renormalise=True, shared_width=32, dense_layers=(0,))
MODELS = {
    "llada": {},
    "dream": {"family": "dream", "num_kv_heads": 2, "shifted": True, "qkv_bias": True, "rope_float32": False},
    "norms, bias": {"qk_norm": True, "num_kv_heads": 2, "linear_bias": True},
    "mixture": {"mixture": MIXTURE},
    "tied": {"tied_head": True},
}
SETTINGS = [
    {"confidence": "margin"},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"eos_token_id": [7, 9], "logits_eos_inf": True, "confidence_eos_eot_inf": True},
    {"cfg_scale": 1.5, "confidence": "entropy"},
]
PROMPTS = [[5, 9, 3, 8], [7, 2], [4, 4, 6]]


def both(plain, bits, keep_head=False):
    """A model with weights of fewer bits, and the plain one that it stands for."""
    found = weight_only_(copy.deepcopy(plain), bits, keep_head=keep_head)
    assert any(isinstance(module, WeightOnly) for module in found.modules())
    return found, dkv.unpack(copy.deepcopy(found))


def same_tokens(models, ids, mask, **call):
    found, want = (dkv.generate(model, ids, mask, output_history=True, **call) for model in models)
    assert torch.equal(found.sequences, want.sequences)
    for own, other in zip(found.history, want.history, strict=True):
        assert torch.equal(own, other)
    return found


def settings_of(policy, settings):
    own = {"schedule": "sliding", "block_length": 5} if policy == "sliding" else {}
    return {"max_new_tokens": 12, "cache": policy, "seed": 3, **own, **settings}


# In float64 sums round too little to change a token.
@pytest.mark.parametrize(("policy", "kind"), sweep(sorted(POLICIES), list(MODELS), quick=5))
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_policy_with_every_kind_of_model(policy, kind, backend):
    number = sorted(POLICIES).index(policy) + list(MODELS).index(kind)
    models = both(small_model(**MODELS[kind]).double(), list(BITS)[number % 2], keep_head=number % 3 == 0)
    with dkv.use_backend(backend):
        same_tokens(models, *pad_rows(PROMPTS), **settings_of(policy, SETTINGS[number % 4]))


# A program of the interpreter takes milliseconds: of each kind of product one.
@pytest.mark.parametrize(("kind", "bits"), [("llada", "int8"), ("mixture", "int4")])
def test_the_kernels_in_float32(kind, bits):
    if not kernel_backend.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    models = both(small_model(**MODELS[kind], num_layers=1), bits)
    with dkv.use_backend("triton"):
        same_tokens(models, torch.tensor([[5, 9, 3]]), None, max_new_tokens=3, cache=dkv.DecodeCache(2))


@pytest.mark.parametrize("folder", ["sdar/sdar_tiny", "nemotron/nemotron_tiny", "llada_moe/llada_moe_tiny"])
@pytest.mark.parametrize("bits", BITS)
def test_published_families(folder, bits):
    plain = dkv.load(GOLDEN / "families" / folder, torch.float64, device="cpu", pack=False)
    if bits == "int4" and any(x.shape[-1] % 32 for x in plain.parameters() if x.dim() > 1):
        bits = "int8"
    ids = torch.tensor([[5, 9, 3, 8, 12], [7, 2, 40, 11, 1]])
    same_tokens(both(plain, bits), ids, None, max_new_tokens=16, block_length=4, cache=dkv.DecodeCache(4))


@pytest.mark.parametrize("kind", ["dream", "mixture"])
@pytest.mark.parametrize("bits", BITS)
def test_steps_are_replayed(kind, bits, taped, monkeypatch):
    """Nothing of a step is read back, and nothing that it takes is made anew: a tape holds it, as a graph would."""
    found, want = both(small_model(**MODELS[kind]).double(), bits)
    ids, mask = pad_rows(PROMPTS)
    call = {"max_new_tokens": 19, "cache": "decode", "seed": 3}

    def eager(model):
        # Banks of plain experts are counted on a CPU, which a graph could not hold.
        with monkeypatch.context() as patch:
            patch.setenv("DKV_GRAPHS", "0")
            return dkv.generate(model, ids, mask, **call).sequences

    expected = eager(want)
    for _ in range(2):
        output = dkv.generate(found, ids, mask, **call)
        assert torch.equal(output.sequences, expected)
        assert output.stats.eager_reason is None and output.stats.replayed_passes
    # Weights elsewhere are not those that the tapes read.
    found.layers[0].o_proj.weight = torch.zeros_like(found.layers[0].o_proj.weight)
    assert not torch.equal(eager(found), expected)
    assert torch.equal(dkv.generate(found, ids, mask, **call).sequences, eager(found))


def test_logits_that_are_asked_for_and_a_processor():
    models = both(small_model().double(), "int8")
    ids = torch.tensor([[5, 9, 3, 8]])
    found, want = (dkv.generate(model, ids, max_new_tokens=6, output_logits=True) for model in models)
    for own, other in zip(found.logits, want.logits, strict=True):
        torch.testing.assert_close(own, other)

    def favour(ids, scores):
        scores[:, 3] += 4
        return scores

    same_tokens(models, ids, None, max_new_tokens=6, logits_processor=favour)
