"""Weights of 8 and 4 bits beside activations of the model's dtype: what stands in the place of plain layers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dkv
from dkv.bench.shapes import SHAPES, random_model, shape, tiny
from dkv.models.export import save_model
from dkv.models.form import Asked, form_of
from dkv.models.mixture import Bank
from dkv.models.packing import PackedHead, PackedLinear, can_pack
from dkv.models.weight_only import BITS, WeightOnly, WeightOnlyBank, WeightOnlyLinear, check_groups, weight_only_
from tests.dkv.conftest import GOLDEN, small_model
from tests.models.test_mixture import MIXTURE

CPU, CARD = torch.device("cpu"), torch.device("cuda")
IDS = torch.tensor([[5, 9, 3, 8, 60]])
KINDS = {
    "plain": {},
    "biases": {"qkv_bias": True, "linear_bias": True},
    "norms": {"qk_norm": True, "num_kv_heads": 2},
    "tied": {"tied_head": True},
    "held back": {"output_bias": True, "clip_qkv": 0.1},
    "mixture": {"mixture": MIXTURE},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def plain(request):
    # Experts of a width that groups of 4 bits divide.
    mixture = {"mixture": MIXTURE.__class__(**{**vars(MIXTURE), "width": 32, "shared_width": 32})}
    return small_model(**(mixture if "mixture" in request.param else request.param)).double()


@pytest.mark.parametrize("bits", BITS)
def test_a_model_computes_with_the_rounded_weights(plain, bits):
    found = weight_only_(copy.deepcopy(plain), bits)
    products = [module for module in found.modules() if isinstance(module, WeightOnly)]
    assert not any(type(module) in (nn.Linear, Bank) for module in found.layers.modules())
    # Joined: q, k, v; o; gate and up; down. Or two banks, and a shared MLP of three.
    assert len(products) == (4 + 2 + 2 + 3 if plain.spec.mixture else 8) + (not plain.spec.tied_head)
    assert found.num_parameters == plain.num_parameters
    rounded = dkv.unpack(copy.deepcopy(found))
    assert [type(module) for module in rounded.modules()] == [type(module) for module in plain.modules()]
    assert rounded.num_parameters == plain.num_parameters and not any(p.requires_grad for p in rounded.parameters())
    torch.testing.assert_close(found(IDS), rounded(IDS), rtol=1e-9, atol=1e-9)
    # And these are near the plain ones: half a step of each scale.
    for name, weight in plain.state_dict().items():
        step = BITS[bits].rounded(weight)[1].max().item() if weight.dim() >= 2 else 0
        # In groups of the joined tensors scales are the same, as they are by output.
        assert (rounded.state_dict()[name] - weight).abs().max() <= 0.5001 * step, name
    assert torch.equal(rounded.embed.weight, plain.embed.weight)


@pytest.mark.parametrize("bits", BITS)
def test_a_state_dict_has_plain_names_and_rounded_weights(plain, bits):
    found = weight_only_(copy.deepcopy(plain), bits)
    state = found.state_dict()
    rounded = dkv.unpack(copy.deepcopy(found)).state_dict()
    assert list(state) == list(rounded) == list(plain.state_dict())
    assert all(torch.equal(state[name], rounded[name]) for name in state)
    plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weights of a packed model cannot be replaced"):
        found.load_state_dict(state)
    with pytest.raises(RuntimeError, match="a packed model cannot be quantised"):
        found.layers[0].qkv_proj.qconfig = None


def saved(model):
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies(plain, again):
    found = weight_only_(copy.deepcopy(plain), "int4")
    other = again(found)
    assert torch.equal(other(IDS), found(IDS))
    assert not {x.data_ptr() for x in other.buffers() if len(x)} & {x.data_ptr() for x in found.buffers() if len(x)}


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half and back": lambda model: model.half().bfloat16(),
    "double": lambda model: model.bfloat16().double().bfloat16(),
    # Of all tensors, whole numbers too.
    "type": lambda model: model.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_is_one_of_activations(plain, cast):
    found = weight_only_(copy.deepcopy(plain), "int8")
    before = copy.deepcopy(found)
    cast(found)
    for (name, own), other in zip(found.named_buffers(), before.buffers(), strict=True):
        assert name.endswith("_like") or (own.dtype == other.dtype and torch.equal(own, other)), name
    assert found.dtype == torch.bfloat16 and found(IDS).dtype == torch.bfloat16
    assert {x.dtype for x in dkv.unpack(found).state_dict().values()} <= {torch.bfloat16, torch.float32}
    off = (found(IDS) - before(IDS)).norm() / before(IDS).norm()
    assert off < (0.3 if plain.spec.mixture else 0.1)


def test_no_gradient_is_lost(plain):
    found = weight_only_(plain, "int8")
    found.embed.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="int8_linear has no gradient"):
        found(IDS)


class Moved(TorchDispatchMode):
    """Bytes that come to the device without memory."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.device.type == "meta" and args[0].device.type == "cpu":
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("keep_head", [False, True])
def test_nothing_but_the_result_comes_to_a_card(bits, keep_head):
    model = small_model(vocab_size=640, mixture=None).to(torch.bfloat16)
    with Moved() as moved:
        found = weight_only_(model, bits, torch.device("meta"), keep_head)
    held = [*found.parameters(), *found.buffers()]
    assert all(x.device.type == "meta" for x in held) and moved.bytes == sum(x.nbytes for x in held)
    assert isinstance(found.head, nn.Linear if keep_head else WeightOnlyLinear)
    assert keep_head or found.head.bits == "int8"
    assert {m.bits for m in found.layers.modules() if isinstance(m, WeightOnly)} == {bits}


@pytest.mark.parametrize("name", ["nemotron/nemotron_tiny", "sdar/sdar_tiny", "llada_moe/llada_moe_tiny"])
def test_a_folder_becomes_what_a_card_would_hold(name):
    folder = GOLDEN / "families" / name
    model = dkv.load(folder, device="cpu", pack=False)
    form = form_of(Asked(None, CARD, weights="int8", keep_head=True), model, torch.bfloat16)
    assert (form.dtype, form.device) == (torch.bfloat16, CPU) and form.made.keywords["device"] == CARD
    made = form.made.func(model, **{**form.made.keywords, "device": CPU})
    assert type(made.head) is nn.Linear and any(isinstance(m, WeightOnlyLinear) for m in made.modules())
    assert any(isinstance(m, WeightOnlyBank) for m in made.modules()) == (model.spec.mixture is not None)


@pytest.mark.parametrize(("weights", "dtype"), [("int8", "bfloat16"), ("int4", None)])
def test_load_reads_to_the_host_and_moves_what_comes_of_it(weights, dtype, monkeypatch):
    """A device without memory stands for a card."""
    monkeypatch.setattr("dkv.models.loader.usable", lambda _: torch.device("meta"))
    model = dkv.load("tiny", dtype, "cuda", weights=weights)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}
    # None is the dtype of the file on a card.
    assert model.dtype == (torch.bfloat16 if dtype else torch.float32) and not model.training
    assert model.layers[0].qkv_proj.bits == weights and isinstance(model.head, WeightOnlyLinear)
    plain = dkv.load("tiny", device="cpu", pack=False)
    assert model.num_parameters == plain.num_parameters
    with pytest.raises(ValueError, match="DiffusionGemma computes with its weights as they are"):
        dkv.load(GOLDEN / "families" / "diffusion_gemma" / "gemma_tiny", device="cuda", weights=weights)


REFUSED = [
    (CPU, {"weights": "int4"}, 'weights="int4" is for GPUs: on a CPU take weights="int8"'),
    (CPU, {"weights": "int7"}, "weights='int7' is not known: did you mean 'int[48]'"),
    (CARD, {"weights": True}, "weights=True is not known: known are int8, int4"),
    (CPU, {"weights": ["int8"]}, r"weights=\['int8'\] is not known: did you mean 'int8'"),
    (CARD, {"weights": "int8", "pack": False}, "weights='int8' have a layout of their own: leave out pack=False"),
    (CARD, {"weights": "int4", "pack": True}, "leave out pack=True"),
    (CARD, {"keep_head": True}, "keep_head goes with weights='int8' or 'int4'"),
    (CARD, {"weights": "int8", "keep_head": 1}, "keep_head must be True or False, got 1"),
    (CPU, {"pack": 0}, "pack must be True, False or None, got 0"),
]


@pytest.mark.parametrize(("device", "arguments", "said"), REFUSED, ids=[str(case[1:2]) for case in REFUSED])
def test_what_does_not_go_together(device, arguments, said):
    with pytest.raises(ValueError, match=said):
        Asked(None, device, **arguments)
    if device == CPU:
        # Before anything is read, or even looked for.
        with pytest.raises(ValueError, match=said):
            dkv.load("no such folder", device="cpu", **arguments)


def test_models_that_cannot_have_4_bits():
    with torch.device("meta"):
        odd = small_model(intermediate_size=72)
    with pytest.raises(ValueError, match=r"\(layers.0.down_proj: .*multiple of 32, got 72\): take weights=\"int8\""):
        check_groups(odd, "int4")
    check_groups(odd, "int8")
    with pytest.raises(ValueError, match="DiffusionGemma computes with its weights as they are"):
        form_of(
            Asked(None, CARD, weights="int4"), dkv.load(GOLDEN / "families/diffusion_gemma/gemma_tiny"), torch.bfloat16
        )


@pytest.mark.skipif(not can_pack(), reason="this build of PyTorch has no oneDNN for this CPU")
def test_the_head_of_a_model_on_a_cpu_is_kept(monkeypatch):
    plain, made = (dkv.load("tiny", device="cpu", pack=pack) for pack in (False, True))
    found = dkv.load("tiny", device="cpu", weights="int8", keep_head=True)
    assert type(found.head) in (PackedLinear, PackedHead) and found.head.dtype == torch.float32
    assert torch.equal(dkv.unpack(found).head.weight, plain.head.weight)
    assert type(made.head) is type(plain.head) or isinstance(made.head, PackedLinear)


def test_what_is_saved_are_plain_weights_as_they_were_rounded(tmp_path):
    model = weight_only_(dkv.load("tiny", device="cpu", pack=False), "int4")
    save_model(model, tmp_path)
    again = dkv.load(tmp_path, device="cpu", pack=False)
    wanted = dkv.unpack(model).state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in again.state_dict().items())


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_groups(name):
    """With the sizes of the published models, of which there is no weight."""
    from dkv.models.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(shape(name, layers=1))
    check_groups(model, "int4")
    assert random_model(tiny(shape(name)), CPU, torch.float32).num_parameters
