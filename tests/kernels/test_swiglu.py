"""swiglu."""

import pytest
import torch

from dkv.kernels import swiglu

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 2), (70, 2500), (0, 4)], ids=str)
def test_against_float64(backend, dtype, shape):
    x = (3 * torch.randn(shape)).to(dtype)
    gate, up = x.double().chunk(2, -1)
    found = swiglu(x)
    assert found.dtype == dtype and found.shape == gate.shape
    roundings = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), gate * torch.sigmoid(gate) * up, rtol=roundings, atol=roundings)


def test_any_strides(backend, restride):
    x = torch.randn(6, 8, 40)
    torch.testing.assert_close(swiglu(restride(x)), swiglu(x))


def test_large_numbers_and_nan(backend):
    x = torch.tensor([[100.0, -100.0, torch.nan, 0.0, 2.0, 2.0, 2.0, torch.nan]])
    found = swiglu(x)[0]
    assert found[0] == 200 and abs(found[1]) < 1e-30 and found[2].isnan() and found[3].isnan()


def test_gradients_are_those_of_pytorch():
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("x", [torch.ones(2, 7), torch.ones(()), torch.ones(2, 8, dtype=torch.int32)], ids=str)
def test_bad_arguments(x):
    with pytest.raises(ValueError, match="gate_up"):
        swiglu(x)
