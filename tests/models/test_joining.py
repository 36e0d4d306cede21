"""Blocks with joined products give what the plain ones give, and their names and weights."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dkv
from dkv.bench.shapes import random_model, shape
from dkv.core.kv_cache import KVCache
from dkv.models.joining import JoinedLayer, join_
from dkv.models.layers import Layer
from tests.models.test_packing import tiny

SWITCHES = {
    "bare": {},
    "biases": {"qkv_bias": True, "linear_bias": True},
    "norms of heads": {"qk_norm": True},
    "tied": {"tied_head": True},
    "one key head": {"num_kv_heads": 1},
    "held back": {"output_bias": True, "clip_qkv": 0.1},
}


@pytest.fixture(params=SWITCHES.values(), ids=SWITCHES)
def plain(request):
    spec = replace(tiny(shape("dream-7b")), **{"qkv_bias": False, **request.param})
    return random_model(spec, torch.device("cpu"), torch.float32, std=0.2)


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("rows", [None, [[4, 1, 0], [2, 2, 5]]], ids=["all", "rows"])
def test_a_joined_model_computes_the_same(plain, rows):
    joined = join_(copy.deepcopy(plain))
    assert all(isinstance(layer, JoinedLayer) for layer in joined.layers)
    ids = torch.randint(0, plain.spec.vocab_size, (2, 6))
    torch.testing.assert_close(joined(ids), plain(ids), rtol=1e-4, atol=1e-4)
    positions, rows = torch.arange(6).expand(2, -1), rows and torch.tensor(rows)
    one, other = (m.step(ids, positions, KVCache(2, 6), outputs=rows) for m in (joined, plain))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_names_and_weights_are_the_plain_ones(plain, tmp_path):
    joined = join_(copy.deepcopy(plain))
    assert joined.num_parameters == plain.num_parameters
    same(joined.state_dict(), plain.state_dict())
    save_file({n: w for n, w in joined.state_dict().items() if n != "head.weight"}, tmp_path / "model.safetensors")
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(weight, plain.state_dict()[name])
    # And no second copy of the weights.
    held = {w.untyped_storage().data_ptr() for w in joined.state_dict().values()}
    assert held <= {p.untyped_storage().data_ptr() for p in joined.parameters()}


def test_weights_are_taken_under_the_plain_names(plain):
    joined, other = join_(copy.deepcopy(plain)), copy.deepcopy(plain)
    for parameter in other.parameters():
        parameter.data.normal_()
    joined.load_state_dict(other.state_dict())
    same(joined.state_dict(), other.state_dict())
    missing = {name: w for name, w in other.state_dict().items() if "layers.0.k_proj" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.k_proj\.weight"):
        joined.load_state_dict(missing)
    before = {name: weight.clone() for name, weight in joined.state_dict().items()}
    changed = {"layers.0.k_proj.weight": torch.zeros_like(before["layers.0.k_proj.weight"])}
    joined.load_state_dict(changed, strict=False)
    same(joined.state_dict(), before | changed)
    with pytest.raises(AttributeError, match=r"dkv\.unpack"):
        joined.layers[0].up_proj  # noqa: B018


def test_unpacking_gives_the_plain_layers_back(plain):
    joined = join_(copy.deepcopy(plain))
    for copied in (copy.deepcopy(joined), pickle.loads(pickle.dumps(joined)), joined.double().float()):
        found = dkv.unpack(copied)
        assert all(type(layer) is Layer for layer in found.layers)
        same(dict(found.named_parameters()), dict(plain.named_parameters()))
        storages = [w.untyped_storage().data_ptr() for w in found.parameters()]
        assert len(set(storages)) == len(storages)


def test_trainable_layers_stay_as_they_are(plain):
    plain.layers[0].up_proj.weight.requires_grad_(True)
    joined = join_(plain)
    assert [type(layer) for layer in joined.layers] == [Layer, *[JoinedLayer] * (len(joined.layers) - 1)]


def test_gradients_flow_through_joined_layers(plain):
    joined, ids = join_(copy.deepcopy(plain)), torch.arange(6)[None]
    for model in (joined, plain):
        model.requires_grad_(True)
        model(ids).square().mean().backward()
    given = plain.layers[0]
    expected = torch.cat([given.q_proj.weight.grad, given.k_proj.weight.grad, given.v_proj.weight.grad])
    torch.testing.assert_close(joined.layers[0].qkv_proj.weight.grad, expected, rtol=1e-3, atol=1e-5)
