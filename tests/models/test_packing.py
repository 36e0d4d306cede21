"""Packed weights: the same results, no second copy, and clear limits."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dkv
from dkv.bench.shapes import random_model, shape, tiny
from dkv.kernels.choose import torch as torch_choice
from dkv.models.export import save_model
from dkv.models.packing import PackedHead, PackedLayer, PackedLinear, can_pack, pack_

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of PyTorch has no oneDNN for this CPU")


@pytest.mark.parametrize("rows", [0, 1, 7, 64, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_those_of_the_plain_layer(rows, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    x = torch.randn(2, rows, 48)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    plain_error = (linear(x) - exact).abs().amax() if rows else torch.tensor(0.0)
    found = PackedLinear(linear)(x)
    assert found.shape == (2, rows, 80)
    assert rows == 0 or (found - exact).abs().amax() <= 2 * plain_error + 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_layers_side_by_side(bias):
    torch.manual_seed(0)
    linears = [nn.Linear(16, size, bias=bias).requires_grad_(False) for size in (32, 16, 8)]
    x = torch.randn(2, 5, 16)
    expected = torch.cat([linear(x) for linear in linears], -1)
    torch.testing.assert_close(PackedLinear(*linears)(x), expected, atol=1e-5, rtol=1e-5)


def test_what_a_product_applies_while_it_writes():
    torch.manual_seed(0)
    linear, x, other = nn.Linear(16, 24).requires_grad_(False), torch.randn(2, 5, 16), torch.randn(2, 5, 24)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(PackedLinear(linear, silu=True)(x), nn.functional.silu(linear(x)), **close)
    torch.testing.assert_close(PackedLinear(linear)(x, add=other), linear(x) + other, **close)
    torch.testing.assert_close(PackedLinear(linear)(x, times=other), linear(x) * other, **close)


@pytest.mark.parametrize("rows", [None, [4, 1, 0, 5, 11]])
@pytest.mark.parametrize(
    "switches",
    [{}, {"qkv_bias": True, "linear_bias": True, "qk_norm": True}, {"output_bias": True, "clip_qkv": 0.1}],
    ids=["bare", "all", "held back"],
)
def test_a_packed_layer_equals_the_plain_one(rows, switches):
    torch.manual_seed(0)
    spec = replace(tiny(shape("dream-7b")), **{"qkv_bias": False, **switches})
    model = random_model(spec, torch.device("cpu"), torch.float32, std=0.2)
    layer, x, rows = model.layers[0], torch.randn(12, spec.hidden_size), rows and torch.tensor(rows)
    seen = []

    def attend(layer, query, key, value):
        seen.append((layer.index, query, key, value))
        return query * value.mean((0, 1), keepdim=True)

    plain = sum(layer(x, None, attend, rows))
    packed, nothing = PackedLayer(layer)(x, None, attend, rows)
    assert nothing is None and packed.shape == plain.shape and seen[0][0] == seen[1][0]
    for one, other in ((plain, packed), *zip(seen[0][1:], seen[1][1:], strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_packing_keeps_the_number_of_weights():
    plain, packed = (dkv.load(GOLDEN / "dream_gqa", device="cpu", pack=pack) for pack in (False, True))
    assert plain.num_parameters == packed.num_parameters > 0


def test_nothing_is_packed_if_one_weight_cannot_be():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="; 1 is"):
        pack_(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("family", ["llada_gqa", "dream_gqa"])
def test_load_packs_on_the_cpu_and_gives_the_same_tokens(family):
    plain, packed = dkv.load(GOLDEN / family, device="cpu", pack=False), dkv.load(GOLDEN / family, device="cpu")
    assert isinstance(packed.head, PackedLinear) and isinstance(plain.head, nn.Linear)
    ids = torch.tensor([[5, 9, 3, 8]])
    call = {"max_new_tokens": 12, "cache": dkv.DecodeCache(4)}
    assert torch.equal(dkv.generate(plain, ids, **call).sequences, dkv.generate(packed, ids, **call).sequences)
    torch.testing.assert_close(packed(ids), plain(ids), atol=1e-4, rtol=1e-4)


def test_other_dtypes_are_not_packed():
    model = dkv.load(GOLDEN / "llada_gqa", device="cpu", dtype="float16")
    assert isinstance(model.head, nn.Linear)
    with pytest.raises(ValueError, match=r"only frozen float32 or bfloat16 .* can be packed; .* is torch.float16"):
        dkv.load(GOLDEN / "llada_gqa", device="cpu", dtype="float16", pack=True)


def test_without_instructions_for_it_bfloat16_is_not_packed(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert isinstance(dkv.load(GOLDEN / "llada_gqa", device="cpu", dtype="bfloat16").head, nn.Linear)
    with pytest.raises(ValueError, match="this CPU has no instructions for bfloat16: leave out pack=True"):
        dkv.load(GOLDEN / "llada_gqa", device="cpu", dtype="bfloat16", pack=True)


def test_trainable_weights_are_not_packed():
    with pytest.raises(ValueError, match="and trainable"):
        pack_(nn.Sequential(nn.Linear(2, 2)))


MOVES = {
    "cast": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "move": lambda model: model.to("meta"),
    "empty": lambda model: model.to_empty(device="meta"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_packed_model_is_not_moved_by_half(move):
    model = dkv.load(GOLDEN / "llada_gqa", device="cpu")
    with pytest.raises(RuntimeError, match=r"cannot be moved or converted .*call dkv.unpack\(model\)"):
        move(model)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    move(dkv.unpack(model))


def test_a_move_to_where_it_is_does_nothing():
    model = dkv.load(GOLDEN / "llada_gqa", device="cpu")
    ids, before = torch.tensor([[5, 9, 3, 8]]), type(model.layers[0])
    expected = model(ids)
    for same in (model.to("cpu"), model.float(), model.cpu(), model.to(torch.float32)):
        assert same is model and type(model.layers[0]) is before
    assert torch.equal(model(ids), expected)


def test_a_tied_head_stays_with_its_embedding(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8)).requires_grad_(False)
    model[2].weight = model[0].weight
    pack_(model)
    assert isinstance(model[1], PackedLinear) and model[2].weight is model[0].weight


def test_the_plain_weight_is_let_go():
    linear = nn.Linear(16, 16).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(linear))
    pack_(model)
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]


def test_a_packed_model_cannot_be_saved(tmp_path):
    with pytest.raises(
        ValueError, match=r"packed weights cannot be saved: call dkv.unpack\(model\), or load the model with pack=False"
    ):
        save_model(dkv.load(GOLDEN / "llada_gqa", device="cpu"), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_strips(bias, monkeypatch):
    monkeypatch.setattr(torch_choice, "STRIP", 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20, bias=bias)).requires_grad_(False)
    x = torch.randn(3, 4)
    expected = model(x)
    packed = pack_(model)[0]
    assert isinstance(packed, PackedHead)
    assert [strip.shape[1] for strip in packed.strips(x)] == [8, 8, 4]
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)


CALLS = [
    ("llada_gqa", {}),
    ("dream_gqa", {"temperature": 0.8, "seed": 1}),
    ("llada_gqa", {"top_k": 5}),
    ("dream_gqa", {"confidence": "margin"}),
]


@pytest.mark.parametrize(("family", "call"), CALLS, ids=str)
def test_a_head_in_strips_gives_the_same_tokens(family, call, monkeypatch):
    plain = dkv.load(GOLDEN / family, device="cpu", pack=False)
    monkeypatch.setattr(torch_choice, "STRIP", 16)
    packed = dkv.load(GOLDEN / family, device="cpu")
    assert isinstance(packed.head, PackedHead)
    ids = torch.tensor([[5, 9, 3, 8]])
    call = {"max_new_tokens": 12, "cache": dkv.DecodeCache(4), **call}
    assert torch.equal(dkv.generate(plain, ids, **call).sequences, dkv.generate(packed, ids, **call).sequences)
    assert packed.num_parameters == plain.num_parameters
