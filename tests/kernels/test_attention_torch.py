"""cached_attention on the torch backend: few queries, which it computes in two plain products."""

import pytest
import torch

from dkv.kernels import Workspace, cached_attention, use_backend
from dkv.kernels.attention import products


def inputs(n: int, query_heads: int, kv_heads: int):
    """Queries, and keys and values that are slices of one larger tensor."""
    torch.manual_seed(n)
    buffer = torch.randn(2, 300, 2, kv_heads, 16)
    return torch.randn(2, n, query_heads, 16), buffer[:, :257, 0], buffer[:, :257, 1]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("rows", [33, 100, 191])
def test_against_the_definition(rows, heads, assert_close):
    q, k, v = inputs(rows * heads[1] // heads[0], *heads)
    with use_backend("reference"):
        exact = cached_attention(q.double(), k.double(), v.double(), scale=0.3)
        rough = cached_attention(q, k, v, scale=0.3)
    work = Workspace()
    with use_backend("torch"):
        assert_close(cached_attention(q, k, v, scale=0.3, workspace=work), exact, rough)
        assert_close(cached_attention(q, k, v, scale=0.3), exact, rough)
    assert work.nbytes > 0


def test_a_row_does_not_depend_on_the_batch():
    q, k, v = inputs(100, 4, 4)
    with use_backend("torch"):
        assert torch.equal(cached_attention(q[1:], k[1:], v[1:]), cached_attention(q, k, v)[1:])


def test_scores_that_would_be_many_are_left_to_sdpa():
    q, work = torch.randn(1, 64, 4, 8), Workspace()
    k = torch.zeros(1, 1, 1, 8).expand(1, 1 << 15, 4, 8)
    with use_backend("torch"):
        assert torch.equal(cached_attention(q, k, k, workspace=work), torch.zeros_like(q))
    assert work.nbytes == 0


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("n", [3, 50, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_sum_exp_changes_no_bit_of_the_output(n, heads, dtype, monkeypatch, assert_close):
    """Packed rows get it from what attends anyway: few queries, products, and many queries; not from a formula."""
    monkeypatch.setattr(products, "_with_lse", None)
    q, k, v = (x.to(dtype) for x in inputs(n, *heads))
    rows = {"query_starts": torch.tensor([0, n]), "query_lengths": torch.tensor([n, n - 1])}
    rows["key_ranges"] = torch.tensor([[0, 257], [9, 100]])
    with use_backend("reference"):
        _, exact = cached_attention(*(x.double() for x in (q.flatten(0, 1), k, v)), return_lse=True, **rows)
        _, rough = cached_attention(*(x.float() for x in (q.flatten(0, 1), k, v)), return_lse=True, **rows)
    with use_backend("torch"):
        out, lse = cached_attention(q.flatten(0, 1), k, v, return_lse=True, **rows)
        assert torch.equal(out, cached_attention(q.flatten(0, 1), k, v, **rows))
    assert_close(lse[:-1], exact[:-1], rough[:-1])


def test_a_log_sum_exp_has_a_gradient():
    q, k, v = inputs(50, 4, 4)
    q.requires_grad_()
    rows = {"query_starts": torch.tensor([0, 50]), "query_lengths": torch.tensor([50, 50])}
    with use_backend("torch"):
        _, lse = cached_attention(q.flatten(0, 1), k, v, return_lse=True, **rows)
    (found,) = torch.autograd.grad(lse.sum(), q)
    scores = torch.einsum("bnhd,bshd->bhns", q, k) * 0.25
    (expected,) = torch.autograd.grad(scores.logsumexp(-1).sum(), q)
    torch.testing.assert_close(found, expected)


def test_the_default_dtype_does_not_matter():
    q, k, v = inputs(64, 4, 4)
    with use_backend("torch"):
        expected = cached_attention(q, k, v)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(cached_attention(q, k, v), expected)
        finally:
            torch.set_default_dtype(before)
