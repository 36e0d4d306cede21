"""Sharing the parameters of a model that is in memory already."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dkv.models import Transformer, load, wrap

IDS = torch.tensor([[1, 2, 3, 63, 63]])


class InMemory(nn.Module):
    """What a loaded Hugging Face model shows: a config, and parameters under its family's names."""

    def __init__(self, checkpoint, prefix: str = "model.", **config):
        super().__init__()
        self.config = SimpleNamespace(**{**checkpoint.config, **config})
        for name, tensor in checkpoint.tensors.items():
            self.set(name.removeprefix("model.") if prefix == "" else name, nn.Parameter(tensor))

    def set(self, name: str, parameter: nn.Parameter) -> None:
        module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        setattr(module, leaf, parameter)


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_parameters_are_shared(small, family, prefix):
    checkpoint = small(family)
    original = InMemory(checkpoint, prefix)
    model = wrap(original)
    assert isinstance(model, Transformer) and not model.training
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in original.parameters()}
    assert all(p.requires_grad for p in original.parameters())
    loaded = load(checkpoint.folder, device="cpu", pack=False)
    assert model.spec == loaded.spec
    with torch.no_grad():
        before = model(IDS)
        torch.testing.assert_close(before, loaded(IDS), atol=0, rtol=0)
        for p in original.parameters():
            p.mul_(1.5)
            changed = model(IDS)
            assert not torch.equal(changed, before)
            before = changed


def test_a_cast_of_the_original_is_seen(small):
    original = InMemory(small())
    model = wrap(original)
    original.double()
    assert model.dtype == torch.float64
    assert model(IDS).dtype == torch.float64


@pytest.mark.parametrize("stated", [True, False])
def test_tied_head(small, stated):
    checkpoint = small("dream")
    del checkpoint.tensors["lm_head.weight"]
    original = InMemory(checkpoint, tie_word_embeddings=stated)
    original.set("lm_head.weight", original.model.embed_tokens.weight)
    model = wrap(original)
    assert model.head.weight is model.embed.weight is original.model.embed_tokens.weight


def test_a_real_qwen2_layout(small):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, architectures=["DreamModel"], mask_token_id=63, eos_token_id=62, pad_token_id=62,
        tie_word_embeddings=False,
    )  # fmt: skip
    original = transformers.Qwen2ForCausalLM(config).eval()
    model = wrap(original)
    everywhere = torch.zeros(1, 1, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), original(IDS, attention_mask=everywhere).logits, atol=1e-5, rtol=1e-5)


def test_refused(small):
    checkpoint = small()
    with pytest.raises(ValueError, match="Linear has no config to tell its family"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown model family: model_type is 'gpt2'"):
        wrap(InMemory(checkpoint, model_type="gpt2", architectures=None))
    with pytest.raises(ValueError, match=r"wte.weight is on the meta device, without storage: load the weights"):
        wrap(InMemory(checkpoint).to("meta"))


def test_quantised_and_mixed_parameters_are_refused(small):
    original, name = InMemory(small()), "model.transformer.ff_out.weight"
    original.set(name, nn.Parameter(torch.ones(64, 16).half()))
    with pytest.raises(ValueError, match=r"several dtypes.*1 of torch.float16.*\.to\(dtype\)"):
        wrap(original)
    original.set(name, nn.Parameter(torch.ones(64, 16).to(torch.uint8), requires_grad=False))
    with pytest.raises(ValueError, match=f"{name} is a Tensor of torch.uint8.*wrap the model first"):
        wrap(original)


def test_names_and_shapes_are_checked(small):
    with pytest.raises(ValueError, match=r"the InMemory in memory lacks tensors.*blocks.2"):
        wrap(InMemory(small(), n_layers=3))
    with pytest.raises(ValueError, match=r"k_proj.weight in the InMemory in memory has shape \[8, 16\].*\[16, 16\]"):
        wrap(InMemory(small(), n_kv_heads=4))
    original = InMemory(small())
    original.value_head = nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match=r"has unexpected tensors: value_head.weight"):
        wrap(original)
