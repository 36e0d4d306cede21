"""Models of transformers with `attn_implementation="dkv"`, against the same models in float64."""

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

V5 = int(transformers.__version__.split(".")[0]) >= 5
NAMES = ["bert", "modernbert", "encoder llama", "llama", "mistral", "gpt2"]
CAUSAL = NAMES[3:]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_sdpa(small, name, side, backend):
    if backend == "triton" and side != "left" and name != "llama":
        pytest.skip("one model is enough for the interpreter")
    ids, mask, real = small.batch(side)
    truth = small.exact(name, side)
    # What sdpa is off is measured on the mask of pairs too: without it, not every version makes an encoder of Llama.
    whole = mask if name in ("bert", "modernbert") else small.pairs(name, real)
    plain = small.run(small.make(name, "sdpa"), ids, whole, real, name)
    small.assert_as_good(small.run(small.make(name, "dkv"), ids, mask, real, name), plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "encoder llama", "llama"])
def test_half_precision(small, name, dtype, backend):
    if backend == "triton" and name not in ("modernbert", "llama"):
        pytest.skip("a window and a causal model are enough for the interpreter")
    ids, mask, real = small.batch("left")
    whole = mask if name in ("bert", "modernbert") else small.pairs(name, real)
    # The truth has the rounded weights.
    truth = small.run(small.make(name, "sdpa").to(dtype).double(), ids, whole, real, name)
    plain = small.run(small.make(name, "sdpa").to(dtype), ids, whole, real, name)
    small.assert_as_good(small.run(small.make(name, "dkv").to(dtype), ids, mask, real, name), plain, truth)


def test_masks_matter(small):
    """The models are sharp enough for a wrong mask to show."""
    causal, both = small.exact("llama", "left"), small.exact("encoder llama", "left")
    assert (causal - both).abs().amax() > 0.1 * both.abs().amax()
    assert (causal - small.exact("mistral", "left")).abs().amax() > 0.1 * both.abs().amax()


@pytest.mark.parametrize("form", [None, "ones", "keys"])
def test_llama_made_an_encoder_by_its_modules(small, form):
    """As with sdpa, a mask of keys that hides something needs its 4-D form then."""
    ids, _, real = small.batch("left" if form == "keys" else None)
    mask = {None: None, "ones": real.long(), "keys": real[:, None, None]}[form]
    model = small.make("llama", "dkv")
    small.set_encoder(model)
    plain = small.run(small.make("llama", "sdpa"), ids, small.pairs("encoder llama", real), real, "llama")
    truth = small.exact("encoder llama", "left" if form == "keys" else None)
    small.assert_as_good(small.run(model, ids, mask, real, "llama"), plain, truth)


@pytest.mark.skipif(not V5, reason="is_causal is an argument of the forward pass since transformers 5")
def test_llama_made_an_encoder_by_argument(small):
    ids, mask, real = small.batch("left")
    with torch.no_grad():
        out = small.make("llama", "dkv")(ids, mask, position_ids=small.positions(real), is_causal=False)[0][real]
    plain = small.run(small.make("llama", "sdpa"), ids, small.pairs("encoder llama", real), real, "llama")
    small.assert_as_good(out, plain, small.exact("encoder llama", "left"))


@pytest.mark.parametrize("form", ["bool", "additive", "additive infinite", "shared", "keys"])
def test_mask_given_by_the_user(small, form):
    ids, _, real = small.batch("left")
    name = "encoder llama"
    if form == "shared":
        real = torch.ones_like(real)
        mask = small.pairs("llama", real)[:1]
        name = "llama"
    else:
        mask = small.pairs(name, real)
    truth = small.run(small.make("llama", "sdpa").double(), ids, mask.expand(len(ids), -1, -1, -1), real, "llama")
    plain = small.run(small.make("llama", "sdpa"), ids, mask.expand(len(ids), -1, -1, -1), real, "llama")
    if form == "keys":
        mask = real[:, None, None]
    if form.startswith("additive"):
        low = -torch.inf if form.endswith("infinite") else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, low)
    small.assert_as_good(small.run(small.make("llama", "dkv"), ids, mask, real, "llama"), plain, truth)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation(small, name, cache, backend):
    """Left-padded prompts, then one query at a time over the cached keys."""
    if backend == "triton" and name != "llama":
        pytest.skip("one model is enough for the interpreter")
    ids, mask, _ = small.batch("left")
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | {
        "return_dict_in_generate": True,
        "output_logits": True,
        "disable_compile": True,
    }
    if cache == "static":
        how["cache_implementation"] = "static"

    def generate(implementation):
        model = small.make(name, implementation, AutoModelForCausalLM)
        out = model.generate(input_ids=ids, attention_mask=mask, **how)
        return out.sequences, torch.stack(out.logits, 1)

    (tokens, logits), (plain_tokens, plain) = generate("dkv"), generate("sdpa")
    assert torch.equal(tokens, plain_tokens)
    # The truth is one pass over all tokens, without a cache.
    real = torch.cat([mask.bool(), torch.ones(len(ids), 4, dtype=torch.bool)], 1)
    with torch.no_grad():
        model = small.make(name, "sdpa", AutoModelForCausalLM).double()
        mask, place = small.pairs(name, real), small.positions(real)
        truth = model(tokens, attention_mask=mask, position_ids=place).logits[:, -5:-1]
    small.assert_as_good(logits, plain, truth)


@pytest.mark.parametrize("name", CAUSAL)
def test_prompt_in_two_parts(small, name, backend):
    """Several queries over more keys: the second part sees the first, and no later key."""
    if backend == "triton" and name == "gpt2":
        pytest.skip("two models are enough for the interpreter")
    ids, _, real = small.batch(None)
    model = small.make(name, "dkv")
    with torch.no_grad():
        past = model(ids[:, :15], use_cache=True).past_key_values
        second = model(ids[:, 15:], past_key_values=past)[0]
    plain = small.run(small.make(name, "sdpa"), ids, None, real, name).view(len(ids), -1, 32)[:, 15:]
    small.assert_as_good(second, plain, small.exact(name, None).view(len(ids), -1, 32)[:, 15:])


def test_packed_sequences(small):
    """Positions that start again part a row into sequences that do not see each other."""
    ids, _, real = small.batch(None)
    sizes = (5, 8, 11)
    place = torch.cat([torch.arange(n) for n in sizes])[None]
    part = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    mask = small.pairs("llama", real[:1]) & (part[:, None] == part)
    with torch.no_grad():
        out = small.make("llama", "dkv")(ids[:1], position_ids=place, use_cache=False)[0]
        plain = small.make("llama", "sdpa")(ids[:1], mask, position_ids=place, use_cache=False)[0]
        truth = small.make("llama", "sdpa").double()(ids[:1], mask, position_ids=place, use_cache=False)[0]
    small.assert_as_good(out, plain, truth)


def test_cross_attention(small):
    """Fewer queries than keys, none of them causal, and padding among the keys."""
    ids, mask, _ = small.batch("left")
    sizes = {"d_model": 32, "vocab_size": 50, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 2}
    sizes |= {
        f"{part}_{size}": n
        for part in ("encoder", "decoder")
        for size, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    outs = []
    for implementation, dtype in (("dkv", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.float64)):
        torch.manual_seed(0)
        model = AutoModel.from_config(
            transformers.BartConfig(**sizes, init_std=0.3), attn_implementation=implementation
        )
        with torch.no_grad():
            outs.append(model.eval().to(dtype)(ids, mask, decoder_input_ids=ids[:, -8:])[0])
    small.assert_as_good(*outs)
