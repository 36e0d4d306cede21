"""gather_rows and scatter_rows_."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dkv.kernels import BACKENDS, gather_rows, scatter_rows_, use_backend

REST = [(), (3,), (2, 5)]  # what follows B and S: a token canvas, hidden states, heads
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def inputs(rest: tuple[int, ...], dtype=torch.float32, b=2, s=7, n=4) -> tuple[Tensor, Tensor, Tensor]:
    """A canvas, distinct slots of each row, and rows to write there."""
    x, source = ((torch.randn(b, size, *rest) * 9).to(dtype) for size in (s, n))
    return x, torch.stack([torch.randperm(s)[:n] for _ in range(b)]), source


@pytest.mark.parametrize("rest", REST, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_one_row_at_a_time(rest, dtype, n, backend):
    x, index, source = inputs(rest, dtype, n=n)
    expected = x.clone()
    for b in range(2):
        for i in range(n):
            expected[b, index[b, i]] = source[b, i]
    assert scatter_rows_(x, index, source) is x
    assert torch.equal(x, expected)
    assert torch.equal(gather_rows(x, index), source)


@st.composite
def canvases(draw) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens [B, S] and distinct slots [B, N]."""
    b, s = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    n = draw(st.integers(0, s))
    slots = [draw(st.permutations(range(s)))[:n] for _ in range(b)]
    return [[100 * row + slot for slot in range(s)] for row in range(b)], slots


@pytest.mark.parametrize("name", sorted(BACKENDS))
@given(canvas=canvases(), integer=st.sampled_from([torch.int32, torch.int64]))
def test_any_slots(name, canvas, integer):
    tokens, slots = canvas
    x, index = torch.tensor(tokens), torch.tensor(slots, dtype=integer).view(len(tokens), -1)
    with use_backend(name):
        active = gather_rows(x, index)
        scatter_rows_(x, index, -active)
    assert active.tolist() == [[row[i] for i in own] for row, own in zip(tokens, slots, strict=True)]
    expected = [[-t if i in own else t for i, t in enumerate(row)] for row, own in zip(tokens, slots, strict=True)]
    assert x.tolist() == expected


def test_a_slot_may_be_gathered_twice(backend):
    x = torch.tensor([[5, 6, 7]])
    assert gather_rows(x, torch.tensor([[2, 2, 0]])).tolist() == [[7, 7, 5]]


def test_source_is_converted(backend):
    x, index, source = inputs((3,), torch.bfloat16)
    wide = source.float() + 0.001
    scatter_rows_(x, index, wide)
    assert torch.equal(gather_rows(x, index), wide.bfloat16())


def test_strides(restride, backend):
    x, index, source = inputs((3,))
    strided, strided_source = restride(x), restride(source)
    strided_index = torch.stack([index, index], -1)[..., 0]
    assert torch.equal(gather_rows(strided, strided_index), gather_rows(x, index))
    scatter_rows_(strided, strided_index, strided_source)
    assert torch.equal(strided, scatter_rows_(x, index, source))


@pytest.mark.parametrize("rest", REST, ids=str)
def test_nothing_is_read_back(rest, no_readback):
    x, index, source = inputs(rest)
    with use_backend("torch"), no_readback():
        gather_rows(x, index, validate=False)
        scatter_rows_(x, index.int(), source, validate=False)


# Public reports


def test_A10_offsets_beyond_32_bits(backend):
    slots, stride = 262146, 8192
    # Memory that is never touched is never given, so this takes a few pages.
    memory = torch.empty(slots * stride, dtype=torch.int8)
    x = memory.as_strided((1, slots, 1), (slots * stride, stride, 1))
    last = torch.tensor([[262145]], dtype=torch.int32)
    scatter_rows_(x, last, torch.tensor([[[77]]], dtype=torch.int8))
    assert memory[262145 * stride] == 77
    assert gather_rows(x, last).item() == 77


@pytest.mark.parametrize("place", [-1, 7, 8])
def test_A19_index_outside(place, backend):
    guarded = torch.arange(2.0 * 9 * 3).view(2, 9, 3)
    before = guarded.clone()
    x = guarded[:, 1:8]
    _, index, source = inputs((3,))
    index[1, 2] = place
    for call in (lambda: gather_rows(x, index), lambda: scatter_rows_(x, index, source)):
        with pytest.raises(IndexError, match=rf"^index must be in 0\.\.6, got {place}$"):
            call()
    assert torch.equal(guarded, before)


ZEROS = torch.zeros(2, 7, 3)
INDEX = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "index", "message"),
    [
        (ZEROS[0, :, 0], INDEX, r"^x must have shape \[B, S, \.\.\.\], got \[7\]"),
        (ZEROS, INDEX[:1], r"^index must have shape \[2, any\]"),
        (ZEROS, INDEX.float(), r"^index must be int32, int64, got float32"),
        (ZEROS, INDEX.to("meta"), r"^index is on meta but x is on cpu"),
    ],
)
def test_arguments_are_checked(x, index, message):
    for call in (lambda: gather_rows(x, index), lambda: scatter_rows_(x, index, ZEROS[:, :4])):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ZEROS[:, :5], r"^source must have shape \[2, 4, 3\]"),
        (ZEROS[:, :4].to("meta"), r"^source is on meta but x is on cpu"),
    ],
)
def test_source_is_checked(source, message):
    with pytest.raises(ValueError, match=message):
        scatter_rows_(ZEROS.clone(), INDEX, source)
