"""The entropies that the sampler gives, by every way to the logits."""

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from dkv import DiffusionConfig, kernels
from dkv.engine.sampler import Sampler
from dkv.models.packing import can_pack, pack_
from tests.dkv.conftest import MASK

RULES = ("probability", "margin", "entropy")
LATE = [3, 7, 8, 41]
TEXTS = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]


class Wrapped(nn.Module):
    """A head that is neither a layer of PyTorch nor comes in strips."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x)


def sampled(model, processor=None, entropy=True, **settings):
    """The choice for 12 hidden states, 11 of which are of rows."""
    torch.manual_seed(3)
    config = DiffusionConfig(max_new_tokens=8, **settings)
    sampler = Sampler(model, config, MASK, kernels.Workspace(), processor, entropy)
    hidden = 3 * torch.randn(12, model.spec.hidden_size)
    keys = torch.arange(12)[:, None] if config.temperature else None
    with torch.no_grad():
        found = sampler(hidden, keys, lambda: [7, 4], lambda: TEXTS)
        return found, model.head(hidden).double()


SETTINGS = [
    {},
    {"logits_eos_inf": True, "eos_token_id": LATE},
    {"confidence_eos_eot_inf": True, "eos_token_id": LATE},
    {"temperature": 0.8},
    {"temperature": 0.8, "confidence_eos_eot_inf": True, "eos_token_id": LATE},
]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("how", SETTINGS, ids=lambda how: "-".join(how) or "default")
def test_entropies_are_those_of_the_confidences(how, model, backend):
    """Without end tokens where the confidences are; at the temperature where they are."""
    for rule in RULES:
        with kernels.use_backend(backend):
            (_, confidence, entropy), logits = sampled(model, confidence=rule, **how)
        if "eos_token_id" in how:
            logits[:, LATE] = -torch.inf
        if "temperature" in how and model.spec.shifted:
            logits /= how["temperature"]
        expected = torch.special.entr(logits.softmax(-1)).sum(-1)
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-7)
        if rule == "entropy":
            sure = confidence > -torch.inf
            assert sure.any() and torch.equal(entropy[sure], -confidence[sure])


@pytest.mark.parametrize("how", [{}, SETTINGS[2], {"temperature": 0.8, "top_k": 5}], ids=["default", "ends", "top-k"])
def test_every_way_to_the_logits_gives_the_same(how, build):
    plain, wrapped = build(), build()
    wrapped.head = Wrapped(wrapped.head)
    processor = LogitsProcessorList([TemperatureLogitsWarper(1.0)])
    found, _ = sampled(plain, **how)
    others = [sampled(wrapped, **how)[0], sampled(plain, processor, **how)[0]]
    if can_pack():
        others.append(sampled(pack_(build()), **how)[0])
    for other in others:
        assert len(other) == 3
        for x, y in zip(other, found, strict=True):
            # The last hidden state belongs to no row, and the processor does not see it.
            torch.testing.assert_close(x[:11], y[:11])


def test_without_anything_but_end_tokens_the_entropy_is_0(build):
    model = build()
    model.head = nn.Linear(model.spec.hidden_size, model.spec.vocab_size).requires_grad_(False)
    model.head.bias.fill_(-torch.inf)[:8] = 0.0
    (token, confidence, entropy), _ = sampled(model, confidence_eos_eot_inf=True, eos_token_id=list(range(8)))
    assert (token < 8).all() and (confidence == -torch.inf).all() and (entropy == 0).all()


def test_none_are_given_unless_asked_for(llada):
    for how in SETTINGS:
        assert len(sampled(llada, entropy=False, **how)[0]) == 2
