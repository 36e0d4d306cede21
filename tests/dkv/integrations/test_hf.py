"""Models of transformers with `attn_implementation="dkv"`, against the same models in float64."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM

import dkv
from dkv.integrations import hf_attention as hf
from dkv.kernels import use_backend

V5 = int(transformers.__version__.split(".")[0]) >= 5
LENGTHS = (21, 24, 9)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": ("BertConfig", {**SIZES, **NO_DROPOUT, "max_position_embeddings": 32}),
    "modernbert": ("ModernBertConfig", {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2}),
    "encoder llama": ("LlamaConfig", GQA),
    "llama": ("LlamaConfig", GQA),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 6}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}),
}  # fmt: skip
CAUSAL = ["llama", "mistral", "gpt2"]


@pytest.fixture(autouse=True)
def registered() -> None:
    dkv.register()


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        from dkv.kernels.common.launch import INTERPRETED

        if not INTERPRETED:
            pytest.skip("needs TRITON_INTERPRET=1")
    with use_backend(request.param):
        yield request.param


def skip_outside(name: str) -> None:
    if name in ("bert", "modernbert") and not V5:
        pytest.skip(f"{name} goes through AttentionInterface since transformers 5")


def make(name: str, implementation: str, auto=AutoModel, **changes) -> nn.Module:
    """A small model with weights that make attention sharp, the same for each implementation."""
    skip_outside(name)
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(**{**sizes, **changes})
    if name == "encoder llama":
        config.is_causal = False
    model = auto.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=1.0 if 50 in weight.shape else 0.3, generator=generator)
    if name == "encoder llama" and not V5:
        set_encoder(model)  # and, with padding, a mask of pairs
    return model


def set_encoder(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def batch(side: str | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Ids, attention mask (None without padding) and which positions are real."""
    width = max(LENGTHS)
    ids = torch.randint(3, 50, (len(LENGTHS), width), generator=torch.Generator().manual_seed(1))
    place = torch.arange(width)
    lengths = torch.tensor(LENGTHS if side else [width] * len(LENGTHS))[:, None]
    real = place >= width - lengths if side == "left" else place < lengths
    return ids.masked_fill(~real, 0), real.long() if side else None, real


def positions(real: torch.Tensor) -> torch.Tensor:
    return (real.cumsum(-1) - 1).clamp(min=0)


def pairs(name: str, real: torch.Tensor, window: int = 6) -> torch.Tensor:
    """Which keys a query sees, [B, 1, N, S], written out here."""
    i, j = torch.arange(real.shape[1])[:, None], torch.arange(real.shape[1])
    rule = {"mistral": (j <= i) & (j > i - window), "encoder llama": torch.ones_like(i == j)}.get(name, j <= i)
    return rule & real[:, None, None]


def run(model, ids, mask, real, name) -> torch.Tensor:
    extra = {} if name in ("bert", "modernbert") else {"position_ids": positions(real)}
    if name == "encoder llama" and not V5 and mask is not None:
        mask = pairs(name, real)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **extra)[0][real]


def exact(name: str, side: str | None) -> torch.Tensor:
    """float64 with sdpa; decoders get the mask of pairs that is written out here."""
    ids, mask, real = batch(side)
    if name not in ("bert", "modernbert"):
        mask = pairs(name, real)
    return run(make(name, "sdpa").double(), ids, mask, real, name)


def assert_as_good(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """`actual` is off by no more than twice what sdpa is off at the same dtype, and a few roundings."""
    assert actual.dtype == plain.dtype
    assert truth.dtype == torch.float64
    eps = torch.finfo(actual.dtype).eps
    bound = 2 * (plain - truth).abs().amax() + 4 * eps * truth.abs().amax()
    off = (actual - truth).abs().amax()
    assert off <= bound, f"off by {off:.3g}, allowed {bound:.3g}"
    assert bound < 0.2 * truth.abs().amax()  # else the test says nothing


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_sdpa(name, side, backend):
    if backend == "triton" and side != "left" and name != "llama":
        pytest.skip("one model is enough for the interpreter")
    ids, mask, real = batch(side)
    truth = exact(name, side)
    # What sdpa is off is measured on the mask of pairs too: without it, not every version makes an encoder of Llama.
    whole = mask if name in ("bert", "modernbert") else pairs(name, real)
    plain = run(make(name, "sdpa"), ids, whole, real, name)
    assert_as_good(run(make(name, "dkv"), ids, mask, real, name), plain, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "encoder llama", "llama"])
def test_half_precision(name, dtype, backend):
    if backend == "triton" and name not in ("modernbert", "llama"):
        pytest.skip("a window and a causal model are enough for the interpreter")
    ids, mask, real = batch("left")
    whole = mask if name in ("bert", "modernbert") else pairs(name, real)
    # The truth has the rounded weights.
    truth = run(make(name, "sdpa").to(dtype).double(), ids, whole, real, name)
    plain = run(make(name, "sdpa").to(dtype), ids, whole, real, name)
    assert_as_good(run(make(name, "dkv").to(dtype), ids, mask, real, name), plain, truth)


def test_masks_matter():
    """The models are sharp enough for a wrong mask to show."""
    causal, both = exact("llama", "left"), exact("encoder llama", "left")
    assert (causal - both).abs().amax() > 0.1 * both.abs().amax()
    assert (causal - exact("mistral", "left")).abs().amax() > 0.1 * both.abs().amax()


@pytest.mark.parametrize("form", [None, "ones", "keys"])
def test_llama_made_an_encoder_by_its_modules(form):
    """As with sdpa, a mask of keys that hides something needs its 4-D form then."""
    ids, _, real = batch("left" if form == "keys" else None)
    mask = {None: None, "ones": real.long(), "keys": real[:, None, None]}[form]
    model = make("llama", "dkv")
    set_encoder(model)
    plain = run(make("llama", "sdpa"), ids, pairs("encoder llama", real), real, "llama")
    assert_as_good(
        run(model, ids, mask, real, "llama"), plain, exact("encoder llama", "left" if form == "keys" else None)
    )


@pytest.mark.skipif(not V5, reason="is_causal is an argument of the forward pass since transformers 5")
def test_llama_made_an_encoder_by_argument():
    ids, mask, real = batch("left")
    with torch.no_grad():
        out = make("llama", "dkv")(ids, mask, position_ids=positions(real), is_causal=False)[0][real]
    plain = run(make("llama", "sdpa"), ids, pairs("encoder llama", real), real, "llama")
    assert_as_good(out, plain, exact("encoder llama", "left"))


@pytest.mark.parametrize("form", ["bool", "additive", "additive infinite", "shared", "keys"])
def test_mask_given_by_the_user(form):
    ids, _, real = batch("left")
    name = "encoder llama"
    if form == "shared":
        real = torch.ones_like(real)
        mask = pairs("llama", real)[:1]
        name = "llama"
    else:
        mask = pairs(name, real)
    truth = run(make("llama", "sdpa").double(), ids, mask.expand(len(ids), -1, -1, -1), real, "llama")
    plain = run(make("llama", "sdpa"), ids, mask.expand(len(ids), -1, -1, -1), real, "llama")
    if form == "keys":
        mask = real[:, None, None]
    if form.startswith("additive"):
        low = -torch.inf if form.endswith("infinite") else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, low)
    assert_as_good(run(make("llama", "dkv"), ids, mask, real, "llama"), plain, truth)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation(name, cache, backend):
    """Left-padded prompts, then one query at a time over the cached keys."""
    if backend == "triton" and name != "llama":
        pytest.skip("one model is enough for the interpreter")
    ids, mask, _ = batch("left")
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | {
        "return_dict_in_generate": True, "output_logits": True, "disable_compile": True,
    }  # fmt: skip
    if cache == "static":
        how["cache_implementation"] = "static"

    def generate(implementation):
        model = make(name, implementation, AutoModelForCausalLM)
        out = model.generate(input_ids=ids, attention_mask=mask, **how)
        return out.sequences, torch.stack(out.logits, 1)

    (tokens, logits), (plain_tokens, plain) = generate("dkv"), generate("sdpa")
    assert torch.equal(tokens, plain_tokens)
    # The truth is one pass over all tokens, without a cache.
    real = torch.cat([mask.bool(), torch.ones(len(ids), 4, dtype=torch.bool)], 1)
    with torch.no_grad():
        model = make(name, "sdpa", AutoModelForCausalLM).double()
        truth = model(tokens, attention_mask=pairs(name, real), position_ids=positions(real)).logits[:, -5:-1]
    assert_as_good(logits, plain, truth)


@pytest.mark.parametrize("name", CAUSAL)
def test_prompt_in_two_parts(name, backend):
    """Several queries over more keys: the second part sees the first, and no later key."""
    if backend == "triton" and name == "gpt2":
        pytest.skip("two models are enough for the interpreter")
    ids, _, real = batch(None)
    model = make(name, "dkv")
    with torch.no_grad():
        past = model(ids[:, :15], use_cache=True).past_key_values
        second = model(ids[:, 15:], past_key_values=past)[0]
    plain = run(make(name, "sdpa"), ids, None, real, name).view(len(ids), -1, 32)[:, 15:]
    assert_as_good(second, plain, exact(name, None).view(len(ids), -1, 32)[:, 15:])


def test_packed_sequences():
    """Positions that start again part a row into sequences that do not see each other."""
    ids, _, real = batch(None)
    sizes = (5, 8, 11)
    place = torch.cat([torch.arange(n) for n in sizes])[None]
    part = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    mask = pairs("llama", real[:1]) & (part[:, None] == part)
    with torch.no_grad():
        out = make("llama", "dkv")(ids[:1], position_ids=place, use_cache=False)[0]
        plain = make("llama", "sdpa")(ids[:1], mask, position_ids=place, use_cache=False)[0]
        truth = make("llama", "sdpa").double()(ids[:1], mask, position_ids=place, use_cache=False)[0]
    assert_as_good(out, plain, truth)


def test_cross_attention():
    """Fewer queries than keys, none of them causal, and padding among the keys."""
    ids, mask, _ = batch("left")
    sizes = {"d_model": 32, "vocab_size": 50, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 2}
    sizes |= {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in
              (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    outs = []
    for implementation, dtype in (("dkv", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.float64)):
        torch.manual_seed(0)
        model = AutoModel.from_config(
            transformers.BartConfig(**sizes, init_std=0.3), attn_implementation=implementation
        )
        with torch.no_grad():
            outs.append(model.eval().to(dtype)(ids, mask, decoder_input_ids=ids[:, -8:])[0])
    assert_as_good(*outs)


@pytest.mark.parametrize("name", ["bert", "encoder llama", "mistral"])
def test_gradients(name):
    ids, mask, real = batch("left")

    def gradients(implementation, dtype):
        model = make(name, implementation).to(dtype).train()
        whole = pairs(name, real) if name != "bert" and (implementation == "sdpa" or not V5) else mask
        extra = {} if name == "bert" else {"position_ids": positions(real)}
        out = model(input_ids=ids, attention_mask=whole, **extra)[0][real]
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
        return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])

    truth = gradients("sdpa", torch.float64)
    assert_as_good(gradients("dkv", torch.float32), gradients("sdpa", torch.float32), truth)


def test_autocast():
    """Rotation leaves float32 queries beside bfloat16 values."""
    ids, mask, real = batch("left")
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(make("llama", "sdpa"), ids, pairs("llama", real), real, "llama")
        out = run(make("llama", "dkv"), ids, mask, real, "llama")
    assert_as_good(out, plain, exact("llama", "left"))


@pytest.mark.parametrize("name", ["bert", "encoder llama"])
def test_compiles_whole(name):
    ids, mask, real = batch("left")
    model = make(name, "dkv")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, ids, mask, real, name), run(model, ids, mask, real, name))


def test_set_on_a_model_in_memory():
    ids, mask, real = batch("left")
    model = make("llama", "sdpa")
    model.set_attn_implementation("dkv")
    assert torch.equal(run(model, ids, mask, real, "llama"), run(make("llama", "dkv"), ids, mask, real, "llama"))


def test_from_pretrained(tmp_path):
    make("encoder llama", "sdpa").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="dkv")
    assert model.config._attn_implementation == "dkv"
    if not V5:
        set_encoder(model)
    data = *batch("right"), "encoder llama"
    assert torch.equal(run(model, *data), run(make("encoder llama", "dkv"), *data))


def test_masks_are_as_cheap_as_can_be():
    """Pairs are written out only where a rule of pairs is not known to the kernels."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(None if attention_mask is None else tuple(attention_mask.shape))
        return hf.attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(hf.NAME, spy)
    b, n = len(LENGTHS), max(LENGTHS)
    whole = (b, 1, n, n)
    expected = {"llama": (None, None, whole), "mistral": (whole,) * 3}
    if V5:
        expected["encoder llama"] = (None, None, (b, 1, 1, n))
    for name, shapes in expected.items():
        ids, padding, _ = batch("left")
        for mask, shape in zip((None, torch.ones_like(padding), padding), shapes, strict=True):
            seen.clear()
            with torch.no_grad():
                make(name, "dkv")(ids, mask)
            assert seen == [shape] * 2, name


# The attention function alone.
B, H, N, S, D = 2, 4, 5, 8, 16


def qkv(n=N, s=S, dtype=torch.float32):
    torch.manual_seed(0)
    return (
        torch.randn(B, H, n, D, dtype=dtype),
        torch.randn(B, 2, s, D, dtype=dtype),
        torch.randn(B, 2, s, D, dtype=dtype),
    )


def module(**attributes) -> SimpleNamespace:
    return SimpleNamespace(config=None, **attributes)


@pytest.mark.parametrize("n", [1, 5, 8])
@pytest.mark.parametrize("asked", [{"is_causal": True}, {}], ids=["argument", "attribute"])
def test_without_a_mask_a_causal_module_sees_no_later_key(n, asked):
    q, k, v = qkv(n)
    out, weights = hf.attention(module(is_causal=not asked), q, k, v, None, **asked)
    visible = torch.arange(S) <= torch.arange(S - n, S)[:, None]
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), visible, enable_gqa=True).transpose(1, 2)
    plain = F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True).transpose(1, 2)
    assert weights is None
    assert_as_good(out, plain, truth)


def test_a_module_that_does_not_say_sees_every_key():
    q, k, v = qkv()
    assert torch.equal(hf.attention(module(), q, k, v, None)[0], hf.attention(None, q, k, v, None, is_causal=False)[0])


def test_a_module_that_does_not_say_among_causal_ones_is_refused():
    """A causal mask is left out for models of this configuration, so None could mean either."""
    config = transformers.LlamaConfig(**GQA)
    with pytest.raises(ValueError, match=r"is_causal.*4-D"):
        hf.attention(SimpleNamespace(config=config), *qkv(), None)


@pytest.mark.parametrize("mask", [torch.ones(B, S), torch.ones(B, S, dtype=torch.long).tril(5)], ids=["float", "long"])
def test_mask_of_keys(mask):
    q, k, v = qkv()
    if mask.is_floating_point():
        with pytest.raises(ValueError, match="attention_mask must be"):
            hf.attention(module(is_causal=False), q, k, v, mask)
    else:
        out = hf.attention(module(is_causal=False), q, k, v, mask)[0]
        assert torch.equal(out, hf.attention(None, q, k, v, mask.bool()[:, None, None])[0])


def test_scaling_and_what_is_harmless():
    q, k, v = qkv()
    plain = F.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True).transpose(1, 2)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.4, enable_gqa=True).transpose(
        1, 2
    )
    out, _ = hf.attention(
        module(is_causal=False), q, k, v, None, scaling=0.4, dropout=0.0, softcap=None, output_attentions=False,
        position_ids=torch.arange(N), use_cache=True, num_items_in_batch=3, something_new=None,
    )  # fmt: skip
    assert_as_good(out, plain, truth)


@pytest.mark.parametrize(
    "name, value",
    [
        ("softcap", 50.0), ("s_aux", torch.zeros(H)), ("sinks", torch.zeros(H)), ("dropout", 0.1),
        ("output_attentions", True), ("head_mask", torch.ones(H)), ("position_bias", torch.zeros(1, H, N, S)),
        ("cu_seq_lens_q", torch.tensor([0, 2, 5])), ("seq_idx", torch.zeros(B, N)), ("something_new", 3),
        ("something_new", torch.zeros(1)), ("sliding_window", 4), ("indices", torch.zeros(B, N)),
    ],
)  # fmt: skip
def test_refused(name, value):
    with pytest.raises(ValueError, match=name):
        hf.attention(module(is_causal=False), *qkv(), None, **{name: value})


def test_a_whole_mask_makes_some_harmless():
    q, k, v = qkv()
    mask = (torch.arange(S) <= torch.arange(N)[:, None]).expand(B, 1, -1, -1)
    extras = {"sliding_window": 4, "cu_seq_lens_q": torch.tensor([0, 5]), "max_length_q": 5}
    assert torch.equal(hf.attention(None, q, k, v, mask, **extras)[0], hf.attention(None, q, k, v, mask)[0])


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(B, H, N, S, dtype=torch.bool), "per head"),
        (torch.ones(B, 1, N, S + 1, dtype=torch.bool), "attention_mask"),
        (torch.ones(B, N, S, dtype=torch.bool), "attention_mask"),
        (torch.ones(B, 1, N, S, dtype=torch.long), "bool or additive"),
        (torch.full((B, 1, N, S), 0.5), "bias on the scores"),
        (torch.full((B, 1, N, S), torch.nan), "bias on the scores"),
        (torch.zeros(B, 1, N, S, requires_grad=True), "gradient"),
    ],
)
def test_masks_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        hf.attention(module(is_causal=False), *qkv(), mask)


def test_values_of_another_size_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="one head size"):
        hf.attention(module(is_causal=False), q, k, v[..., :8], None)


def test_models_that_ask_for_more_are_refused():
    ids, mask, _ = batch("left")
    gemma = transformers.Gemma2Config(**GQA, head_dim=16, attn_logit_softcapping=20.0)
    with pytest.raises(ValueError, match=r"softcap.*eager"):
        AutoModel.from_config(gemma, attn_implementation="dkv")(ids, mask)
    with pytest.raises(ValueError, match=r"dropout.*attention_dropout"):
        make("llama", "dkv", attention_dropout=0.2).train()(ids, mask)
    make("llama", "dkv", attention_dropout=0.2).eval()(ids, mask)
    with pytest.raises(ValueError, match=r"output_attentions.*eager"):
        make("llama", "dkv")(ids, mask, output_attentions=True)
    model = make("llama", "dkv")
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


def test_before_registration():
    """Either line is enough, in a process where the other was not run."""
    lines = ["dkv.register()", "import dkv.integrations.hf_attention"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *lines], capture_output=True, text=True, check=True)
    error, *registered = done.stdout.splitlines()
    assert "attn_implementation" in error and registered == [f"registered by {line}" for line in lines]
