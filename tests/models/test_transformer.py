"""The plain forward pass: padding, gradients, and agreement with the step over a buffer."""

import pytest
import torch

from dkv.core.kv_cache import KVCache
from dkv.models import ModelSpec, Transformer


def small_spec(**changes) -> ModelSpec:
    sizes = {
        "family": "llada",
        "vocab_size": 64,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_positions": 256,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "mask_token_id": 63,
    }
    return ModelSpec(**{**sizes, **changes})


@pytest.fixture(params=[{}, {"qk_norm": True}, {"linear_bias": True}, {"tied_head": True}], ids=str)
def model(request):
    torch.manual_seed(0)
    return Transformer(small_spec(**request.param)).eval()


def test_B01_the_attention_mask_is_honoured(model):
    ids, mask = torch.tensor([[5, 0], [5, 9]]), torch.tensor([[1, 0], [1, 1]])
    masked, unmasked, alone = model(ids, mask), model(ids), model(ids[:1, :1])
    torch.testing.assert_close(masked[0, 0], alone[0, 0], atol=1e-5, rtol=0)
    assert (masked[0, 0] - unmasked[0, 0]).abs().max() > 1e-3
    torch.testing.assert_close(masked[1], unmasked[1], atol=1e-5, rtol=0)


def test_a_step_over_all_slots_is_the_forward_pass(model):
    ids = torch.randint(0, 63, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    rows = torch.tensor([[2, 8], [0, 5]])
    expected = model(ids)
    with torch.no_grad():
        hidden = model.step(ids, positions, KVCache(2, 9))
        torch.testing.assert_close(model.head(hidden), expected, atol=1e-5, rtol=1e-5)
        some = model.step(ids, positions, KVCache(2, 9), outputs=rows)
        torch.testing.assert_close(some, hidden.gather(1, rows.unsqueeze(-1).expand(2, 2, 64)))


def test_a_partial_step_reads_the_rest_from_the_buffer(model):
    """With unchanged tokens, recomputing some slots over the buffer gives what the full pass gave."""
    ids = torch.randint(0, 63, (1, 9))
    buffer = KVCache(1, 9)
    with torch.no_grad():
        full = model.step(ids, torch.arange(9).expand(1, 9), buffer)
        active = torch.tensor([[1, 4, 8]])
        part = model.step(ids.gather(1, active), active, buffer)
    torch.testing.assert_close(part[0], full[0, active[0]], atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_plain_forward(model):
    model(torch.randint(0, 63, (2, 5))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads .4. must be a multiple of num_kv_heads .3."),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"mask_token_id": 64}, "mask_token_id .64. is outside the vocabulary of 64"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_impossible_specs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_spec(**changes)


def test_buffers_need_rows_and_slots():
    with pytest.raises(ValueError, match="at least one row and one slot"):
        KVCache(0, 4)
