"""Models of transformers with `attn_implementation="dkv"`: made, trained, compiled, refused; and what masks cost."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel

import dkv
from dkv.integrations import hf_attention as hf

V5 = int(transformers.__version__.split(".")[0]) >= 5
GEMMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
GEMMA |= {"num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 16, "attn_logit_softcapping": 20.0}


@pytest.mark.parametrize("name", ["bert", "encoder llama", "mistral"])
def test_gradients(small, name):
    ids, mask, real = small.batch("left")

    def gradients(implementation, dtype):
        model = small.make(name, implementation).to(dtype).train()
        whole = small.pairs(name, real) if name != "bert" and (implementation == "sdpa" or not V5) else mask
        extra = {} if name == "bert" else {"position_ids": small.positions(real)}
        out = model(input_ids=ids, attention_mask=whole, **extra)[0][real]
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
        return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])

    truth = gradients("sdpa", torch.float64)
    small.assert_as_good(gradients("dkv", torch.float32), gradients("sdpa", torch.float32), truth)


def test_autocast(small):
    """Rotation leaves float32 queries beside bfloat16 values."""
    ids, mask, real = small.batch("left")
    with torch.autocast("cpu", torch.bfloat16):
        plain = small.run(small.make("llama", "sdpa"), ids, small.pairs("llama", real), real, "llama")
        out = small.run(small.make("llama", "dkv"), ids, mask, real, "llama")
    small.assert_as_good(out, plain, small.exact("llama", "left"))


@pytest.mark.parametrize("name", ["encoder llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_compiles_whole(small, name):
    ids, mask, real = small.batch("left")
    model = small.make(name, "dkv")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(small.run(compiled, ids, mask, real, name), small.run(model, ids, mask, real, name))


def test_set_on_a_model_in_memory(small):
    ids, mask, real = small.batch("left")
    model = small.make("llama", "sdpa")
    model.set_attn_implementation("dkv")
    data = ids, mask, real, "llama"
    assert torch.equal(small.run(model, *data), small.run(small.make("llama", "dkv"), *data))


def test_from_pretrained(small, tmp_path):
    small.make("encoder llama", "sdpa").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="dkv")
    assert model.config._attn_implementation == "dkv"
    if not V5:
        small.set_encoder(model)
    data = *small.batch("right"), "encoder llama"
    assert torch.equal(small.run(model, *data), small.run(small.make("encoder llama", "dkv"), *data))


def test_masks_are_as_cheap_as_can_be(small):
    """Pairs are written out only where a rule of pairs is not known to the kernels."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(None if attention_mask is None else tuple(attention_mask.shape))
        return hf.attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(hf.NAME, spy)
    b, n = small.batch(None)[0].shape
    whole = (b, 1, n, n)
    expected = {"llama": (None, None, whole), "mistral": (whole,) * 3}
    if V5:
        expected["encoder llama"] = (None, None, (b, 1, 1, n))
    for name, shapes in expected.items():
        ids, padding, _ = small.batch("left")
        for mask, shape in zip((None, torch.ones_like(padding), padding), shapes, strict=True):
            seen.clear()
            with torch.no_grad():
                small.make(name, "dkv")(ids, mask)
            assert seen == [shape] * 2, name


def test_models_that_ask_for_more_are_refused(small):
    ids, mask, _ = small.batch("left")
    gemma = transformers.Gemma2Config(**GEMMA)
    with pytest.raises(ValueError, match=r"softcap.*eager"):
        AutoModel.from_config(gemma, attn_implementation="dkv")(ids, mask)
    with pytest.raises(ValueError, match=r"dropout.*attention_dropout"):
        small.make("llama", "dkv", attention_dropout=0.2).train()(ids, mask)
    small.make("llama", "dkv", attention_dropout=0.2).eval()(ids, mask)
    with pytest.raises(ValueError, match=r"output_attentions.*eager"):
        small.make("llama", "dkv")(ids, mask, output_attentions=True)
    model = small.make("llama", "dkv")
    model.config._output_attentions = True  # a config of before the name was chosen
    with pytest.raises(ValueError, match=r"output_attentions.*eager"):
        model(ids, mask)


def test_twice_is_harmless():
    dkv.register()
    dkv.register()
    assert AttentionInterface()["dkv"] is hf.attention
    assert AttentionMaskInterface()["dkv"] is hf.make_mask


SCRIPT = """
import os, sys
import dkv, dkv.kernels
assert "transformers" not in sys.modules
import transformers
config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
try:
    transformers.AutoModel.from_config(config, attn_implementation="dkv")
except ValueError as error:
    print(error, flush=True)
for line in sys.argv[1:]:
    if not os.fork():
        exec(line)
        transformers.AutoModel.from_config(config, attn_implementation="dkv")
        print("registered by", line, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_before_registration():
    """Either line is enough, in a process where the other was not run."""
    lines = ["dkv.register()", "import dkv.integrations.hf_attention"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *lines], capture_output=True, text=True, check=True)
    error, *registered = done.stdout.splitlines()
    assert "attn_implementation" in error and registered == [f"registered by {line}" for line in lines]
