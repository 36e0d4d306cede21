"""int8_linear and int4_linear: products with weights of 8 and 4 bits."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dkv.kernels import int4_linear, int8_linear, packed4, unpacked4, use_backend
from dkv.kernels.common.backend import interpreted as in_interpreter
from dkv.kernels.linear import torch as fallback

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPERATIONS = {8: int8_linear, 4: int4_linear}
bits = pytest.mark.parametrize("bits", OPERATIONS)


class Sample(NamedTuple):
    """A weight of some bits, float64 [..., N, K], and how it is stored."""

    exact: Tensor
    stored: Tensor
    scales: Tensor


def sample(bits: int, *size: int) -> Sample:
    scales = torch.rand(size[:-1]) / 100 + 1e-4
    if bits == 8:
        numbers = torch.randint(-127, 128, size, dtype=torch.int8)
        return Sample(numbers.double() * scales.double().unsqueeze(-1), numbers, scales)
    stored, scales = packed4(torch.randn(size) * scales.unsqueeze(-1))
    return Sample(unpacked4(stored, scales.double()), stored, scales)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Rounded once, after sums in float32."""
    assert found.dtype == dtype and found.shape == exact.shape
    if found.numel():
        sums = 1e-14 if dtype == torch.float64 else 32 * torch.finfo(torch.float32).eps
        slack = exact[exact.isfinite()].abs().amax().item() * sums
        torch.testing.assert_close(
            found.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=slack, equal_nan=True
        )


def by_expert(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """float64 [T, N], each entry by the weight [E, N, K] of its expert."""
    starts = [0, *ends[:-1]]
    return torch.cat([x[a:b].double() @ one.T for a, b, one in zip(starts, ends, weight, strict=True)])


@bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_against_float64(backend, bits, dtype, bias):
    for rows, outputs, inputs in (((3, 5), 70, 192), ((1,), 33, 160), ((40,), 300, 128), ((0, 2), 5, 32), ((), 7, 64)):
        x, weight = torch.randn(*rows, inputs).to(dtype), sample(bits, outputs, inputs)
        shift = torch.randn(outputs).to(dtype) if bias else None
        found = OPERATIONS[bits](x, weight.stored, weight.scales, shift)
        close(found, x.double() @ weight.exact.T + (shift.double() if bias else 0), dtype)


def test_of_no_inputs_there_is_the_bias(backend):
    weight, scales, bias = torch.zeros(4, 0, dtype=torch.int8), torch.ones(4), torch.randn(4)
    for size in ((3, 2), (0,)):
        found = int8_linear(torch.zeros(*size, 0), weight, scales, bias)
        assert torch.equal(found, bias.expand(*size, 4))


@st.composite
def drawn(draw):
    """Rows, outputs, inputs, the entries of some experts, and a seed."""
    entries = draw(st.lists(st.integers(0, 40), max_size=4))
    size = draw(st.integers(0, 70)), draw(st.integers(1, 300)), draw(st.integers(1, 9))
    return *size, entries, draw(st.integers(0, 2**20))


@bits
@pytest.mark.parametrize("run_by", ["torch", "triton"])
@settings(max_examples=12)
@given(drawn())
def test_random_shapes(bits, run_by, some):
    rows, outputs, groups, entries, seed = some
    if run_by == "triton" and not in_interpreter():
        pytest.skip("needs TRITON_INTERPRET=1")
    torch.manual_seed(seed)
    dtype, inputs = DTYPES[seed % 3], 32 * groups + (seed % 31 if bits == 8 else 0)
    ends = torch.tensor(entries).cumsum(0).int() if entries else None
    experts = [len(entries)] if entries else []
    x = torch.randn(sum(entries) if entries else rows, inputs).to(dtype)
    weight = sample(bits, *experts, outputs, inputs)
    exact = by_expert(x, weight.exact, ends.tolist()) if entries else x.double() @ weight.exact.T
    with use_backend(run_by):
        close(OPERATIONS[bits](x, weight.stored, weight.scales, ends=ends), exact, dtype)


@bits
@pytest.mark.parametrize("ends", [[0, 3, 3, 20, 60, 60], [0, 0, 60], [60, 60], [60], [0, 0]], ids=str)
def test_experts_without_entries(backend, bits, ends):
    x, weight = torch.randn(ends[-1], 64), sample(bits, len(ends), 20, 64)
    cuts = torch.tensor(ends, dtype=torch.int32)
    close(OPERATIONS[bits](x, weight.stored, weight.scales, ends=cuts), by_expert(x, weight.exact, ends), x.dtype)


@bits
def test_any_strides(backend, restride, bits):
    x, weight = torch.randn(6, 8, 64), sample(bits, 20, 64)
    expected = OPERATIONS[bits](x, weight.stored, weight.scales)
    apart = weight.stored.new_zeros(20, 2, weight.stored.shape[1] + 3)[:, 1, 1:-2].copy_(weight.stored)
    for stored in (apart, weight.stored.T.contiguous().T):
        scales = torch.stack((weight.scales, weight.scales), -1)[..., 0]
        found = OPERATIONS[bits](restride(x), stored, scales)
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
@bits
def test_nan_and_large_numbers_stay_in_their_row(backend, bits):
    x, weight = torch.randn(5, 64), sample(bits, 40, 64)
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    found = OPERATIONS[bits](x, weight.stored, weight.scales)
    assert not found[1].isfinite().any() and found[[0, 3, 4]].isfinite().all()
    # Sums of whole numbers that no float16 holds.
    large = torch.full((2, 64), 200.0, dtype=torch.float16)
    stored, scales = torch.full((3, 64), 127, dtype=torch.int8), torch.full((3,), 1e-3)
    close(int8_linear(large, stored, scales), torch.full((2, 3), 64 * 200 * 127e-3, dtype=torch.float64), large.dtype)


@bits
@pytest.mark.parametrize("ends", [None, [0, 3]])
def test_nothing_is_read_back(bits, ends, no_readback):
    weight = sample(bits, *([2] if ends else []), 20, 64)
    x, cuts = torch.randn(3, 64), None if ends is None else torch.tensor(ends, dtype=torch.int32)
    operation = getattr(fallback, f"int{bits}_linear")
    expected = operation(x, weight.stored, weight.scales, None, cuts)
    with pytest.MonkeyPatch.context() as patch, no_readback():
        patch.setattr("dkv.kernels.common.operation.readable", lambda ends: False)  # as on a GPU
        found = operation(x, weight.stored, weight.scales, None, cuts)
    torch.testing.assert_close(found, expected)


@bits
def test_a_strip_of_the_weight_at_a_time(bits, monkeypatch):
    x, weight, sizes = torch.randn(3, 64), sample(bits, 50, 64), []
    operation, product = (getattr(fallback, name.format(bits)) for name in ("int{}_linear", "_int{}"))
    whole = operation(x, weight.stored, weight.scales, None, None)

    def seen(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        sizes.append(len(weight))
        return product(x, weight, scales)

    monkeypatch.setattr(fallback, f"_int{bits}", seen)
    monkeypatch.setattr(fallback, "STRIP_BYTES", 12 * 64 * 4)
    torch.testing.assert_close(operation(x, weight.stored, weight.scales, None, None), whole)
    assert sizes == [12, 12, 12, 12, 2]


def test_four_bits_are_the_nearest():
    for inputs, group in ((256, 128), (192, 64), (96, 32)):
        weight = torch.randn(2, 5, inputs) * torch.logspace(-4, 4, 5)[:, None]
        stored, scales = packed4(weight)
        assert stored.shape == (2, 5, inputs // 2) and stored.dtype == torch.uint8
        assert scales.shape == (2, 5, inputs // group)
        off = (unpacked4(stored, scales) - weight).unflatten(-1, (-1, group)).abs().amax(-1)
        assert (off <= 0.5001 * scales).all()
        # What is in 4 bits already is kept as it is, the largest of a group with its sign.
        again, same = packed4(unpacked4(stored, scales))
        assert torch.equal(again, stored)
        torch.testing.assert_close(same, scales)
    assert (unpacked4(*packed4(torch.zeros(3, 64))) == 0).all()
    for inputs in (0, 31, 100):
        with pytest.raises(ValueError, match=f"a multiple of 32, got {inputs}"):
            packed4(torch.zeros(2, inputs))
