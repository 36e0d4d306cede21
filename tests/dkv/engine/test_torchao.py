"""Models that torchao has quantised: `quantize_` changes the weights of plain layers, the head among them."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dkv
from dkv.engine.graphs import weights_of
from tests.dkv.engine.test_graphs import POLICIES
from tests.dkv.engine.test_graphs import taped as taped  # a fixture

torchao = pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module", params=["tiny", "tiny-dream"])
def pair(request):
    """A quantised model, and the same one with a plain head, of the same weights as they were rounded."""
    model = dkv.load(request.param, device="cpu", pack=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    plain = copy.deepcopy(model)
    plain.head.weight = nn.Parameter(model.head.weight.dequantize(), requires_grad=False)
    return model, plain


SETTINGS = {
    "none": {"temperature": 0.5, "top_k": 9, "top_p": 0.9},
    "prefix": {"eos_token_id": [17], "logits_eos_inf": True, "confidence_eos_eot_inf": True},
    "dual": {"threshold": 0.9},
    "decode": {"confidence": "entropy"},
}


@pytest.mark.parametrize("cache", POLICIES, ids=str)
def test_a_quantised_head_is_multiplied_by_its_layer(pair, cache):
    model, plain = pair
    encoded = dkv.load_tokenizer("tiny")(["1+2=", "12+34="], return_tensors="pt", padding=True)
    own = SETTINGS.get(cache, {}) if isinstance(cache, str) else {}
    call = {"max_new_tokens": 16, "block_length": 8, "cache": cache, "seed": 1, **own}
    if model.spec.shifted:
        call.pop("block_length")
    found, want = (dkv.generate(x, **encoded, **call) for x in (model, plain))
    assert torch.equal(found.sequences, want.sequences)


def test_steps_with_quantised_weights_are_replayed_and_know_them_again(pair, taped):
    model, plain = pair
    ids = torch.tensor([[1, 12, 2, 14]])
    found, want = (dkv.generate(x, ids, max_new_tokens=16, cache="decode", seed=1) for x in (model, plain))
    assert found.stats.replayed_passes and torch.equal(found.sequences, want.sequences)
    pointers = [x.data_ptr() for x in weights_of(model)]
    # Numbers, scales and zero points of each; 0 would be that of a wrapper, which has no memory.
    assert all(pointers) and len(pointers) > len(list(model.parameters()))
