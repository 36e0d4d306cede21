"""Weights are told apart, however they are held."""

import dkv
from dkv.models.digest import digest


def test_weights_are_told_apart_however_they_are_held():
    model, plain = dkv.load("tiny", device="cpu"), dkv.load("tiny", device="cpu", pack=False)
    assert digest(model) == digest(plain) != digest(dkv.load("tiny-dream", device="cpu"))
    plain.norm.weight.data[0] += 1
    assert digest(model) != digest(plain)
