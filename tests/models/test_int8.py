"""Weights of 8 bits: products of bytes, models of them, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dkv
from dkv.bench.shapes import FAMILIES, of_family, random_model, shape, tiny
from dkv.bench.speed.weights import weight_bytes
from dkv.models.int8 import Int8Linear, quantised, rounded, why_not_int8
from dkv.models.packing import PackedHead, PackedLayer, int8_bytes, pack_

pytestmark = pytest.mark.skipif(why_not_int8() is not None, reason="this CPU does not multiply bytes")


def frozen(inputs, outputs, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 200])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 96, True), (33, 17, False), (256, 8, True)])
def test_a_product_is_that_of_the_rounded_numbers(tokens, inputs, outputs, bias):
    linear = frozen(inputs, outputs, bias)
    x, other = torch.randn(tokens, inputs) * 3, torch.randn(tokens, outputs)
    numbers, scale = rounded(x)
    weight, scales = quantised(linear.weight)
    exact = ((numbers.double() - 128) * scale.double()) @ (weight.double() * scales.double()[:, None]).T
    exact = exact + (linear.bias.double() if bias else 0)
    packed, close = Int8Linear(linear), {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(packed(x).double(), exact, **close)
    torch.testing.assert_close(packed(x, add=other).double(), exact + other, **close)
    # Half a step for every activation and every weight, and both at once.
    if tokens:
        size, wide = x.abs().amax(-1, keepdim=True) / 254, linear.weight.abs().amax(1) / 254
        bound = size * linear.weight.abs().sum(1) + x.abs().sum(-1, keepdim=True) * wide + inputs * size * wide
        assert ((packed(x) - linear(x)).abs() <= bound * 1.01 + 1e-5).all()


def test_a_token_gets_the_same_bits_whoever_stands_beside_it():
    packed, x = Int8Linear(frozen(512, 384)), torch.randn(130, 512) * torch.logspace(-3, 3, 130)[:, None]
    whole = packed(x)
    for some in (slice(3, 4), slice(0, 17), slice(60, 130)):
        assert torch.equal(packed(x[some]), whole[some])


def test_joined_products_and_their_shared_input_give_what_each_gives_alone():
    linears = [frozen(48, size, seed=size) for size in (32, 16, 8)]
    x = torch.randn(2, 5, 48)
    joined = Int8Linear(*linears)
    assert torch.equal(joined(x), torch.cat([Int8Linear(linear)(x) for linear in linears], -1))
    assert torch.equal(joined(joined.taken(x)), joined(x)) and joined.packed_bytes == 48 * 56 + 4 * 56


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none_and_harms_no_other_token(value):
    packed, x = Int8Linear(frozen(16, 8)), torch.randn(4, 16)
    broken = x.clone()
    broken[2, 5] = value
    found = packed(broken)
    assert not found[2].isfinite().any() and torch.equal(found[[0, 1, 3]], packed(x)[[0, 1, 3]])


def test_zeros_give_the_bias_and_tiny_numbers_no_overflow():
    linear = frozen(16, 8)
    packed = Int8Linear(linear)
    assert torch.equal(packed(torch.zeros(3, 16)), linear.bias.expand(3, 8))
    assert packed(torch.full((1, 16), 1e-38)).isfinite().all()
    assert packed(torch.full((1, 16), 3e38)).isfinite().all()


def test_copies_pickles_and_plain_layers_have_the_same_numbers():
    linear = frozen(24, 40)
    packed, x = Int8Linear(linear), torch.randn(3, 24)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), packed(x))
    weight, scales = quantised(linear.weight)
    plain = dkv.unpack(packed)
    assert torch.equal(plain.weight, weight.float() * scales[:, None]) and torch.equal(plain.bias, linear.bias)
    # What is rounded once stays as it is.
    assert torch.equal(Int8Linear(plain)(x), packed(x))


SPECS = {"llada": shape("d128x4"), **{name: of_family(name, shape("d128x4")) for name in FAMILIES}}


@pytest.mark.parametrize("name", SPECS)
def test_models_compute_what_their_rounded_weights_give(name):
    spec = tiny(SPECS[name])
    model = random_model(spec, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, spec.vocab_size - 2, (2, 12), generator=torch.Generator().manual_seed(0))
    blocks = {} if spec.attention != "block" or spec.block_length else {"block_ids": torch.arange(12).expand(2, 12)}
    whole = model(ids, **blocks)
    packed = pack_(copy.deepcopy(model), Int8Linear)
    assert weight_bytes(packed) == int8_bytes(model)
    found = packed(ids, **blocks)
    # Experts are chosen anew where two are nearly as good.
    near = (found - whole).norm() / whole.norm()
    assert 0 < near < (0.5 if spec.mixture else 0.1)
    assert isinstance(packed.layers[0], PackedLayer) and packed.num_parameters == model.num_parameters
    assert not any(type(module) is nn.Linear for module in packed.layers.modules())


def test_a_wide_head_is_multiplied_in_strips_of_bytes():
    model = nn.Sequential(nn.Linear(16, 20_000)).requires_grad_(False)
    x = torch.randn(3, 16)
    want = Int8Linear(copy.deepcopy(model[0]))(x)
    packed = pack_(model, Int8Linear)[0]
    assert isinstance(packed, PackedHead) and torch.equal(packed(x), want)


@pytest.mark.parametrize("cache", [None, dkv.DecodeCache(4), dkv.DualCache()])
def test_rows_of_a_loaded_model_get_what_each_gets_alone(cache):
    model, tokenizer = dkv.load("tiny", device="cpu", weights="int8"), dkv.load_tokenizer("tiny")
    encoded = tokenizer(["1+2=", "12+34="], return_tensors="pt", padding=True, padding_side="left")
    settings = {"max_new_tokens": 16, "block_length": 8, "cache": cache, "seed": 0}
    rows = dkv.generate(model, **encoded, **settings).sequences
    for row, real, found in zip(encoded.input_ids, encoded.attention_mask.bool(), rows, strict=True):
        alone = dkv.generate(model, row[real][None], **settings).sequences[0]
        assert torch.equal(alone[-16:], found[-16:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weights": "int7"}, "weights='int7' is not known"),
        ({"weights": "int8", "dtype": "bfloat16"}, "leave out dtype, got torch.bfloat16"),
        ({"weights": "int8", "pack": False}, "leave out pack=False"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_read(arguments, said):
    with pytest.raises(ValueError, match=said):
        dkv.load("tiny", **{"device": "cpu", **arguments})


def test_another_cpu_is_told_why_not(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="this CPU has no VNNI instructions: leave it out"):
        dkv.load("tiny", device="cpu", weights="int8")
    with pytest.raises(RuntimeError, match="this CPU has no VNNI"):
        copy.deepcopy(Int8Linear(frozen(4, 4)))


def test_a_packed_model_is_not_moved_cast_or_trained():
    model = dkv.load("tiny", device="cpu", weights="int8")
    with pytest.raises(RuntimeError, match="packed for float32 on the CPU"):
        model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="no gradient flows"):
        Int8Linear(frozen(4, 4))(torch.randn(1, 4, requires_grad=True))
    assert dkv.unpack(model).to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_is_rounded_without_a_copy_in_float32(dtype):
    spec = tiny(shape("d128x4"))
    model = random_model(spec, torch.device("cpu"), dtype)
    want = pack_(copy.deepcopy(model).float(), Int8Linear)
    found = pack_(model, Int8Linear)
    ids = torch.arange(12)[None]
    assert found.dtype == torch.float32 and torch.equal(found(ids), want(ids))
