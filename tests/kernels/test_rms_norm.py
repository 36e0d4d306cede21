"""rms_norm."""

import pytest
import torch

from dkv.kernels import rms_norm

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def exact(x, gain, eps, residual=None):
    """In float64; the sum is rounded as it is kept."""
    total = x if residual is None else x + residual
    y = total.double()
    return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * gain.double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5, 48), (1, 128), (7, 1000), (2, 0, 16), (130, 2)], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_against_float64(backend, dtype, shape, added):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) if added else None
    gain, before = torch.randn(shape[-1]).to(dtype), (x.clone(), None if residual is None else residual.clone())
    found = rms_norm(x, gain, 1e-5, residual=residual)
    if added:
        found, total = found
        assert total.dtype == dtype and torch.equal(total, before[0] + before[1])
    expected = exact(*before[:1], gain, 1e-5, before[1])
    assert found.dtype == dtype and found.shape == x.shape
    roundings = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=roundings, atol=roundings)
    assert torch.equal(x, before[0])


def test_any_strides(backend, restride):
    x, residual, gain = torch.randn(6, 8, 40), torch.randn(6, 8, 40), torch.randn(40)
    expected = rms_norm(x, gain, 1e-5, residual=residual)
    found = rms_norm(restride(x), restride(gain[None])[0], 1e-5, residual=restride(residual))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_eps_keeps_zeros_at_zero_and_nan_shows(backend):
    x = torch.zeros(3, 24)
    x[1] = torch.nan
    x[2, 5] = torch.inf
    found = rms_norm(x, torch.ones(24), 1e-5)
    assert (found[0] == 0).all() and found[1].isnan().all() and found[2, 5].isnan()
    assert torch.equal(rms_norm(torch.zeros(1, 24), torch.ones(24), 1e-5, residual=x[2:])[1], x[2:])


def test_rows_longer_than_a_tile_go_to_pytorch(interpreted):
    x, gain = torch.randn(2, 16385), torch.randn(16385)
    torch.testing.assert_close(interpreted.rms_norm(x, gain, 1e-5).double(), exact(x, gain, 1e-5), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_pytorch():
    x, residual, gain = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 8), (3, 8), (8,)))
    assert torch.autograd.gradcheck(lambda *given: rms_norm(given[0], given[2], residual=given[1]), (x, residual, gain))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 0)}, "last dimension of at least 1"),
        ({"x": torch.ones(())}, "last dimension of at least 1"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x must be"),
        ({"gain": torch.ones(7)}, "gain"),
        ({"gain": torch.ones(8).half()}, "gain"),
        ({"residual": torch.ones(1, 8)}, "residual"),
        ({"residual": torch.ones(2, 8).half()}, "residual"),
        ({"residual": torch.ones(2, 8, device="meta")}, "residual"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    given = {"x": torch.ones(2, 8), "gain": torch.ones(8)} | change
    with pytest.raises(ValueError, match=message):
        rms_norm(**given)
