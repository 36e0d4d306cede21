"""Packed models that are copied, pickled, saved, and turned back into plain ones."""

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dkv
from dkv.bench.shapes import random_model, shape, tiny
from dkv.kernels.choose import torch as torch_choice
from dkv.models.export import save_model
from dkv.models.packing import PackedLayer, PackedLinear, can_pack, pack_

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.tensor([[5, 9, 3, 8]])
SWITCHES = {
    "plain": {},
    "biases": {"qkv_bias": True, "linear_bias": True},
    "norms": {"qk_norm": True},
    "tied": {"tied_head": True},
    "one key head": {"num_kv_heads": 1},
    "held back": {"output_bias": True, "clip_qkv": 0.1},
}
pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of PyTorch has no oneDNN for this CPU")


@pytest.fixture(params=SWITCHES.values(), ids=SWITCHES)
def pair(request, monkeypatch):
    """A plain model and the same one packed, its head in strips."""
    monkeypatch.setattr(torch_choice, "STRIP", 48)
    spec = replace(tiny(shape("dream-7b")), **{"qkv_bias": False, **request.param})
    plain = random_model(spec, torch.device("cpu"), torch.float32, std=0.2)
    # Bits that arithmetic would not keep.
    plain.layers[0].q_proj.weight.data.view(-1)[:4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    return plain, pack_(copy.deepcopy(plain))


def same_bits(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(
        torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def test_R22_unpacking_gives_back_every_bit(pair):
    plain, packed = pair
    assert isinstance(packed.layers[0], PackedLayer) and packed.num_parameters == plain.num_parameters
    found = dkv.unpack(packed)
    assert found is packed and not any(hasattr(m, "packed") for m in found.modules())
    assert same_bits(dict(found.named_parameters()), dict(plain.named_parameters()))
    assert (found.head.weight is found.embed.weight) == plain.spec.tied_head
    assert [type(m) for m in found.modules()] == [type(m) for m in plain.modules()]
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert len({p.untyped_storage().data_ptr() for p in found.parameters()}) == len(list(found.parameters()))
    assert dkv.unpack(found) is found
    pack_(found)
    assert isinstance(found.layers[0], PackedLayer)


def test_a_state_dict_has_the_plain_names_and_weights(pair):
    plain, packed = pair
    assert same_bits(packed.state_dict(), plain.state_dict())
    assert same_bits(packed.layers[0].state_dict(prefix="x."), plain.layers[0].state_dict(prefix="x."))
    stored = io.BytesIO()
    torch.save(packed.state_dict(), stored)
    stored.seek(0)
    other = copy.deepcopy(plain)
    nn.init.zeros_(other.head.weight)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert same_bits(other.state_dict(), plain.state_dict())
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"weights of a packed model cannot be replaced: call dkv.unpack\(model\)"
        ):
            packed.load_state_dict(plain.state_dict(), strict=strict)


def saved(model):
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_R22_copies_stay_packed_and_are_their_own(pair, again):
    plain, packed = pair
    found = again(packed)
    assert isinstance(found.layers[0], PackedLayer) and found.num_parameters == plain.num_parameters
    with torch.no_grad():
        found.norm.weight.mul_(2)
    found.norm.weight.data.mul_(0.5)
    assert torch.equal(found.embed(IDS), packed.embed(IDS))
    assert same_bits(dkv.unpack(found).state_dict(), plain.state_dict())
    # What was done to the copy is not seen in the original.
    assert isinstance(packed.layers[0], PackedLayer) and same_bits(packed.state_dict(), plain.state_dict())


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_R22_copies_give_the_same_tokens(again):
    model = dkv.load("tiny-dream", device="cpu")
    call = {"max_new_tokens": 12, "cache": dkv.DecodeCache(4)}
    expected = dkv.generate(model, IDS, **call).sequences
    assert torch.equal(dkv.generate(again(model), IDS, **call).sequences, expected)


def test_a_pickle_where_nothing_can_be_packed(monkeypatch):
    stored = pickle.dumps(PackedLinear(nn.Linear(4, 4).requires_grad_(False)))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"PyTorch cannot pack .* here: save it after dkv.unpack\(model\)"):
        pickle.loads(stored)


def test_an_unpacked_model_is_cast_trained_and_exported(tmp_path):
    model = dkv.unpack(dkv.load("tiny", device="cpu"))
    save_model(model, tmp_path / "folder")
    again = dkv.load(tmp_path / "folder", device="cpu", pack=False)
    assert same_bits(again.state_dict(), model.state_dict())
    model.requires_grad_(True)
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert dkv.generate(model.to(torch.bfloat16), IDS, max_new_tokens=4).sequences.shape == (1, 8)


def test_no_gradient_is_lost_in_a_packed_model():
    model = dkv.load("tiny", device="cpu")
    model.embed.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"no gradient flows through packed weights: call dkv.unpack\(model\)"):
        model(IDS)
    dkv.generate(model, IDS, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_R22_dynamic_quantisation():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = dkv.load("tiny", device="cpu")
    quantise = getattr(quantization, "quantize_dynamic", None)
    if quantise is None:
        pytest.skip("this torch has no quantize_dynamic")
    with pytest.raises(RuntimeError, match=r"a packed model cannot be quantised: call dkv.unpack\(model\)"):
        quantise(model, {nn.Linear}, dtype=torch.qint8)
    expected = dkv.unpack(model)(IDS)
    quantised = quantise(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    assert nn.functional.cosine_similarity(quantised(IDS).flatten(), expected.flatten(), dim=0) > 0.99
    output = dkv.generate(quantised, IDS, max_new_tokens=8, cache=dkv.DecodeCache(4))
    assert output.sequences.shape == (1, 12) and output.sequences.max() < model.spec.vocab_size
    assert torch.equal(model(IDS), expected)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a model from dkv.load, got str"):
        dkv.unpack("tiny")
    linear = nn.Linear(4, 6).requires_grad_(False)
    assert torch.equal(dkv.unpack(PackedLinear(linear)).weight, linear.weight)
