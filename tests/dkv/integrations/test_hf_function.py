"""The attention function that transformers calls, alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers

from dkv.integrations import hf_attention as hf

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
def test_without_a_mask_a_causal_module_sees_no_later_key(small, n, asked):
    q, k, v = qkv(n)
    out, weights = hf.attention(module(is_causal=not asked), q, k, v, None, **asked)
    visible = torch.arange(S) <= torch.arange(S - n, S)[:, None]
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), visible, enable_gqa=True).transpose(1, 2)
    plain = F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True).transpose(1, 2)
    assert weights is None
    small.assert_as_good(out, plain, truth)


def test_a_module_that_does_not_say_sees_every_key():
    q, k, v = qkv()
    assert torch.equal(hf.attention(module(), q, k, v, None)[0], hf.attention(None, q, k, v, None, is_causal=False)[0])


def test_a_module_that_does_not_say_among_causal_ones_is_refused():
    """A causal mask is left out for models of this configuration, so None could mean either."""
    config = transformers.LlamaConfig(hidden_size=32)
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


def test_scaling_and_what_is_harmless(small):
    q, k, v = qkv()
    plain = F.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True).transpose(1, 2)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.4, enable_gqa=True).transpose(
        1, 2
    )
    out, _ = hf.attention(
        module(is_causal=False),
        q,
        k,
        v,
        None,
        scaling=0.4,
        dropout=0.0,
        softcap=None,
        output_attentions=False,
        position_ids=torch.arange(N),
        use_cache=True,
        num_items_in_batch=3,
        something_new=None,
    )
    small.assert_as_good(out, plain, truth)


@pytest.mark.parametrize(
    "name, value",
    [
        ("softcap", 50.0),
        ("s_aux", torch.zeros(H)),
        ("sinks", torch.zeros(H)),
        ("dropout", 0.1),
        ("output_attentions", True),
        ("head_mask", torch.ones(H)),
        ("position_bias", torch.zeros(1, H, N, S)),
        ("cu_seq_lens_q", torch.tensor([0, 2, 5])),
        ("seq_idx", torch.zeros(B, N)),
        ("something_new", 3),
        ("something_new", torch.zeros(1)),
        ("sliding_window", 4),
        ("indices", torch.zeros(B, N)),
    ],
)
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
