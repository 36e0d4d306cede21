"""gather_rows and scatter_rows_."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dkv.kernels import BACKENDS, gather_rows, scatter_rows_, use_backend

REST = [(), (3,), (2, 5)]  # what follows B and S: a token canvas, hidden states, heads
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
DTYPES += [torch.complex128, torch.float8_e4m3fn]


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


TILES = [(1, 1), (2, 4), (4, 4), (4, 16), (16, 1)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("columns", [1, 3, 4, 5])
def test_around_one_tile(tile, n, columns, interpreted):
    """As many rows and columns as a tile has, one fewer and one more."""
    x, index, source = inputs((columns,), n=n)
    row = interpreted.launch.Launch(tile, 1)
    expected = x.clone()
    with use_backend("reference"):
        scatter_rows_(expected, index, source)
    assert interpreted.scatter_rows_(x, index, source, row=row) is x
    assert torch.equal(x, expected)
    assert torch.equal(interpreted.gather_rows(x, index, row=row), source)


@pytest.mark.parametrize("rest", [(70,), (2, 600), (1025,)], ids=str)
def test_long_rows(rest, backend):
    x, index, source = inputs(rest)
    scatter_rows_(x, index, source)
    assert torch.equal(gather_rows(x, index), source)


def test_only_the_named_rows_are_written(backend):
    whole = torch.full((4, 9, 5), torch.nan)
    _, index, source = inputs((3,))
    x = scatter_rows_(whole[1:3, 1:8, 1:4], index, source)
    assert torch.equal(x.isfinite().all(2), torch.zeros(2, 7, dtype=torch.bool).scatter(1, index, True))
    assert whole.isfinite().sum() == source.numel()


def test_bit_patterns_are_kept(backend):
    """A row is moved, not computed: NaN keeps its payload, and zero its sign."""
    bits = torch.tensor([0x7FC1, -1, -32768, 1], dtype=torch.int16).view(1, 4, 1)
    assert torch.equal(
        gather_rows(bits.view(torch.bfloat16), torch.tensor([[3, 2, 1, 0]])).view(torch.int16), bits.flip(1)
    )


def test_a_conjugate_is_resolved(backend):
    x = torch.randn(2, 7, 3, dtype=torch.complex64)
    index = torch.tensor([[1, 0], [6, 2]])
    assert torch.equal(gather_rows(x.conj(), index), gather_rows(x, index).conj())
    negated = x[:, :, 0].conj().imag
    assert negated.is_neg()
    assert torch.equal(gather_rows(negated, index), -x[:, :, 0].imag.gather(1, index))
    scatter_rows_(negated, index, torch.ones(2, 2))
    assert torch.equal(x[:, :, 0].imag.gather(1, index), -torch.ones(2, 2))


def test_a_row_alone_and_in_company_gives_the_same_bits(backend):
    x, index, source = inputs((5,), b=8)
    found, whole = gather_rows(x, index), scatter_rows_(x.clone(), index, source)
    for i in range(8):
        own = x[i : i + 1].clone(), index[i : i + 1], source[i : i + 1]
        assert torch.equal(gather_rows(*own[:2])[0], found[i])
        assert torch.equal(scatter_rows_(*own)[0], whole[i])


# Public reports


def test_A11_whole_numbers_in_bfloat16(backend):
    x = torch.randint(-2, 3, (2, 16, 16))
    index = torch.stack([torch.randperm(16) for _ in range(2)])
    expected = x.gather(1, index[:, :, None].expand(-1, -1, 16))
    assert torch.equal(gather_rows(x.bfloat16(), index).long(), expected)
    assert torch.equal(scatter_rows_(torch.zeros_like(x).bfloat16(), index, expected.float()).long(), x)


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
