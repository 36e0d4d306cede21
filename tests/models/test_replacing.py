"""Models that are given another form: one module after the other, without a second copy of the weights."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import dkv
from dkv.bench.shapes import random_model, shape, tiny
from dkv.models.int8 import Int8Linear, why_not_int8
from dkv.models.joining import JoinedLayer, join_, replace_
from dkv.models.layers import Layer
from dkv.models.packed import PackedLinear
from dkv.models.packing import can_pack, pack_
from dkv.models.weight_only import WeightOnlyLinear, weight_only_

NO_VNNI = pytest.mark.skipif(bool(why_not_int8()), reason="this CPU does not multiply bytes")
NO_PACK = pytest.mark.skipif(not can_pack(), reason="this build of PyTorch has no oneDNN for this CPU")
int8_ = partial(weight_only_, bits="int8")
# What is done before, what is done, and the modules in whose place others come.
CHANGES = {
    "joined": (lambda model: model, join_, Layer),
    "packed": pytest.param(lambda model: model, pack_, nn.Linear, marks=NO_PACK),
    "bytes": pytest.param(lambda model: model, partial(pack_, kind=Int8Linear), nn.Linear, marks=NO_VNNI),
    "int8": (join_, int8_, nn.Linear),
    "int4": (join_, partial(weight_only_, bits="int4"), nn.Linear),
    "packed, and back": pytest.param(pack_, dkv.unpack, PackedLinear, marks=NO_PACK),
    "joined, and back": (join_, dkv.unpack, JoinedLayer),
    "int8, and back": (int8_, dkv.unpack, WeightOnlyLinear),
}
LAYERS, OF_A_LAYER = 6, 7


@pytest.mark.parametrize(("before", "change", "kind"), CHANGES.values(), ids=CHANGES)
def test_weights_are_freed_in_turn(before, change, kind, monkeypatch):
    spec = replace(tiny(shape("llada-8b")), num_layers=LAYERS)
    model = before(random_model(spec, torch.device("cpu"), torch.float32))
    alive, left = weakref.WeakSet(m for m in model.modules() if type(m) is kind), []
    most, put = len(alive), nn.Module.__setattr__

    def counted(owner: nn.Module, name: str, value: object) -> None:
        put(owner, name, value)
        if type(owner) is nn.ModuleList or owner is model:
            left.append(len(alive))

    monkeypatch.setattr(nn.Module, "__setattr__", counted)
    change(model)
    monkeypatch.undo()
    # The head, and what is in the layer that was replaced last, may still be held.
    assert most >= LAYERS
    assert left
    assert min(left) <= min(OF_A_LAYER, most // LAYERS) + 1


def test_replaced_modules_are_not_entered():
    model, seen = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)), []

    def by(name: str, module: nn.Module) -> nn.Module:
        seen.append(name)
        return nn.Identity() if isinstance(module, nn.Linear) else module

    assert replace_(model, by) is model
    assert seen == ["0", "0.0", "0.1", "1"]
    assert [type(m).__name__ for m in model.modules()] == ["Sequential", "Sequential", "Identity", "ReLU", "Identity"]
