"""The plain forward pass: padding, gradients, and agreement with the step over a buffer."""

import math

import pytest
import torch

from dkv.core.kv_cache import KVCache
from dkv.models import ModelSpec, Transformer
from dkv.models.rotary import Proportional, QueryScale, Yarn, frequencies


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


VARIANTS = {
    "plain": {},
    "norms of heads": {"qk_norm": True},
    "biases": {"linear_bias": True},
    "tied": {"tied_head": True},
    "heads of an odd size": {"head_dim": 24, "output_bias": True, "clip_qkv": 0.3},
    "half rotated": {"rotary_dim": 8, "qk_norm": True},
    "YaRN": {"rope": Yarn(4.0, 32), "query_scale": QueryScale(0.5, 4)},
    "proportional": {"rope": Proportional(0.25)},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
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
        ({"rotary_dim": 7}, r"rotary_dim must be even and in 2..16, the head size, or None, got 7"),
        ({"rotary_dim": 18}, r"rotary_dim must be even and in 2..16, .*, got 18"),
        ({"clip_qkv": 0.0}, "clip_qkv must be a finite number above 0, or None, got 0.0"),
        ({"rope": Yarn(2.0, 16), "rope_theta": 1.0}, "rope_theta must be above 1 for YaRN"),
        ({"attention": "causal"}, "attention must be one of 'full', 'block', 'prefix_causal', got 'causal'"),
        ({"attention": "block", "block_length": 0}, "block_length must be at least 1, or None, got 0"),
        ({"attention": "prefix_causal"}, "attention='prefix_causal' needs a block_length"),
        ({"block_length": 4}, "block_length, .* need attention='block' or 'prefix_causal', not 'full'"),
        ({"seeded": True}, "seeded need attention='block'"),
    ],
)
def test_impossible_specs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_spec(**changes)


def test_buffers_need_rows_and_slots():
    with pytest.raises(ValueError, match="at least one row and one slot"):
        KVCache(0, 4)


def seen_alone(model, ids, blocks):
    """Logits of every slot, from a pass over the slots that it sees and no others."""
    out = []
    for own in blocks.unique().tolist():
        seen = blocks <= own
        logits = model(ids[None, seen], block_ids=torch.zeros(1, int(seen.sum()), dtype=torch.int64))
        out.append(logits[0][blocks[seen] == own])
    return torch.cat(out)


@pytest.mark.parametrize("block", [1, 3, 4, 16])
def test_a_slot_sees_its_block_and_all_before_it(block):
    """With one layer what is seen is computed from tokens alone; with more it also rests on what these saw."""
    torch.manual_seed(0)
    model = Transformer(small_spec(num_layers=1, attention="block", block_length=block)).eval()
    ids, blocks = torch.randint(0, 63, (11,)), torch.arange(11) // block
    with torch.no_grad():
        found = model(ids[None])
        assert torch.equal(found, model(ids[None], block_ids=blocks[None]))
        torch.testing.assert_close(found[0], seen_alone(model, ids, blocks), atol=1e-5, rtol=0)


@pytest.mark.parametrize("left", [0, 3])
def test_padding_beside_blocks(left):
    """Pads are invisible, do not count in the positions, and count in the blocks; what they compute is a number."""
    torch.manual_seed(0)
    model = Transformer(small_spec(attention="block", block_length=4)).eval()
    ids, mask = torch.randint(0, 63, (1, 12)), torch.ones(1, 12, dtype=torch.int64)
    pads = slice(0, left) if left else slice(9, 12)
    mask[:, pads] = 0
    real, blocks = mask[0].bool(), torch.arange(12) // 4
    with torch.no_grad():
        found, alone = model(ids, mask), model(ids[:, real], block_ids=blocks[None, real])
    torch.testing.assert_close(found[0, real], alone[0], atol=1e-5, rtol=0)
    assert found.isfinite().all()


def test_block_ids_that_are_missing_or_of_another_shape():
    model = Transformer(small_spec(attention="block"))
    with pytest.raises(ValueError, match="block_ids are needed: the spec of this model does not say"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"block_ids must be \[1, 4\], as the tokens, got \[4\]"):
        model(torch.zeros(1, 4, dtype=torch.int64), block_ids=torch.zeros(4, dtype=torch.int64))


def test_queries_cost_nothing_more_before_the_original_length():
    model = Transformer(small_spec(query_scale=QueryScale(0.5, 128)))
    assert len(model.rope_tables(128)) == 2
    cos, _, scale = model.rope_tables(129)
    assert scale[127] == 1 and scale[128].item() == pytest.approx(1 + 0.5 * math.log(2), rel=1e-6)
    assert model.rope_tables(128)[0] is cos


YARNS = [(16.0, 16384, 128, 1e6), (0.25, 16384, 128, 1e6), (4.0, 16, 24, 1e4), (32.0, 4, 16, 1e6)]


@pytest.mark.parametrize(("factor", "original", "size", "theta"), YARNS)
def test_yarn_is_that_of_transformers(factor, original, size, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"factor": factor, "original_max_position_embeddings": original, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = transformers.LlamaConfig(
        hidden_size=2 * size,
        num_attention_heads=2,
        max_position_embeddings=4 * original,
        rope_theta=theta,
        rope_scaling={"rope_type": "yarn", "rope_theta": theta, "beta_fast": 32.0, "beta_slow": 1.0, **rope},
    )
    expected, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert attention == 1.0
    plain = frequencies(theta, size, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(Yarn(factor, original).changed(plain, theta), expected, rtol=1e-6, atol=0)


def test_proportional_frequencies():
    plain = frequencies(1e4, 16, torch.device("cpu"), torch.float32)
    assert Proportional(0.4).changed(plain, 1e4).tolist() == [*plain[:3].tolist(), 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Yarn(0.0, 16), "factor must be a finite number above 0, got 0.0"),
        (lambda: Yarn(2.0, 0), "original must be a finite number above 0"),
        (lambda: Yarn(2.0, 16, beta_fast=math.inf), "beta_fast must be a finite"),
        (lambda: QueryScale(-1.0, 16), "beta must be a finite"),
        (lambda: Proportional(1.5), "share must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_rotations_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
