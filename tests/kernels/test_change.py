"""row_change, keep_rows_: hidden states against those that were kept, and their store."""

import pytest
import torch

from dkv.kernels import keep_rows_, row_change
from tests.kernels.sweeps import sweep

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Rows, slots, entries and numbers of each: one, odd ones, several tiles in the interpreter, none.
SHAPES = [(1, 1, 1, 1), (2, 9, 7, 48), (3, 50, 140, 500), (2, 5, 0, 16), (1, 6, 4, 1000)]


def states(b, s, t, d, dtype, added=True):
    """States, what is added, kept states, and slots and rows of which none is named twice."""
    place = torch.randperm(b * s)[:t]
    x, delta, kept = (torch.randn(*size, d).to(dtype) for size in ((t,), (t,), (b, s)))
    return x, delta if added else None, kept, place % s, place // s


@pytest.mark.parametrize(("shape", "dtype", "added"), sweep(SHAPES, FLOATS, [False, True], quick=4))
def test_change_against_float64(backend, dtype, shape, added):
    x, delta, kept, positions, rows = states(*shape, dtype, added)
    if kept.numel():
        kept[0, 0] = 0
    total = x if delta is None else x + delta
    old = kept[rows, positions].double()
    expected = (total.double() - old).abs().mean(-1) / (old.square().mean(-1).sqrt() + 1e-6)
    found = row_change(x, kept, positions, rows, delta=delta)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # In the interpreter a sum of bfloat16 is not rounded.
    slack = torch.finfo(dtype).eps if added and dtype == torch.bfloat16 and backend == "triton" else 0
    torch.testing.assert_close(found.double(), expected, rtol=2e-6 + 2 * slack, atol=2 * slack)


@pytest.mark.parametrize(
    ("shape", "dtype", "added", "some"), sweep(SHAPES, FLOATS, [False, True], [False, True], quick=6)
)
def test_what_goes_on_is_kept(backend, dtype, shape, added, some):
    x, delta, kept, positions, rows = states(*shape, dtype, added)
    entries = torch.arange(len(x))[::2] if some else None
    if some:
        positions, rows = positions[::2], rows[::2]
    total, before = x if delta is None else x + delta, kept.clone()
    expected = total if entries is None else total[entries]
    found = keep_rows_(x, kept, positions, rows, entries=entries, delta=delta)
    assert torch.equal(found, expected) and found.dtype == dtype
    before[rows, positions] = expected
    assert torch.equal(kept, before)
    if found.numel():
        found.add_(1)
        assert torch.equal(kept, before) and not torch.equal(found, x[: len(found)])


def test_a_spare_slot_takes_what_fills_up(backend):
    x, kept = torch.randn(5, 32), torch.zeros(2, 4, 32)
    positions, rows = torch.tensor([1, 0, 3, 3, 3]), torch.tensor([0, 1, 0, 0, 0])
    entries = torch.tensor([4, 2, 0, 0, 0])
    found = keep_rows_(x, kept, positions, rows, entries=entries)
    assert torch.equal(found, x[entries]) and torch.equal(kept[[0, 1], [1, 0]], x[[4, 2]])
    assert not kept[1, 1:].any() and not kept[0, [0, 2]].any()
    assert row_change(x, kept, positions, rows).isfinite().all()


def test_any_strides(backend, restride):
    x, delta, kept, positions, rows = states(2, 9, 7, 40, torch.float32)
    expected = row_change(x, kept, positions, rows, delta=delta)
    torch.testing.assert_close(
        row_change(restride(x), restride(kept), positions, rows, delta=restride(delta)), expected
    )
    places, other = torch.stack([positions, rows], 1), restride(kept)
    torch.testing.assert_close(row_change(x, kept, *places.unbind(1), delta=delta), expected)
    assert torch.equal(keep_rows_(restride(x), other, *places.unbind(1), delta=restride(delta)), x + delta)
    assert torch.equal(keep_rows_(x, kept, positions, rows, delta=delta), x + delta) and torch.equal(other, kept)


def test_nan_shows(backend):
    x, delta, kept, positions, rows = states(1, 8, 4, 24, torch.float32)
    x[1, 3] = torch.nan
    assert row_change(x, kept, positions, rows, delta=delta).isnan().tolist() == [False, True, False, False]


def test_states_longer_than_a_tile_go_to_pytorch(interpreted):
    x, delta, kept, positions, rows = states(1, 3, 2, 16385, torch.float32)
    expected = row_change(x, kept, positions, rows, delta=delta)
    torch.testing.assert_close(interpreted.row_change(x, kept, positions, rows, delta=delta), expected)
    assert torch.equal(interpreted.keep_rows_(x, kept, positions, rows, delta=delta), x + delta)


@pytest.mark.parametrize("operation", [row_change, keep_rows_])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 8)}, "x must have shape"),
        ({"x": torch.ones(3, 8)}, "positions must have shape"),
        ({"x": torch.ones(2, 8).half()}, "kept must be"),
        ({"x": torch.ones(2, 0), "kept": torch.ones(2, 5, 0)}, "last dimension of at least 1"),
        ({"kept": torch.ones(2, 5, 7)}, "kept must have shape"),
        ({"kept": torch.ones(2, 5, 8, device="meta")}, "kept is on"),
        ({"delta": torch.ones(1, 8)}, "delta must have shape"),
        ({"delta": torch.ones(2, 8).half()}, "delta must be"),
        ({"positions": torch.tensor([0, 1]).int()}, "positions must be"),
        ({"rows": torch.tensor([0])}, "rows must have shape"),
        ({"rows": torch.tensor([0, 2])}, "rows must be in 0..1"),
        ({"positions": torch.tensor([-1, 0])}, "positions must be in 0..4"),
    ],
    ids=str,
)
def test_bad_arguments(operation, change, message):
    index = torch.tensor([0, 1])
    given = {"x": torch.ones(2, 8), "kept": torch.ones(2, 5, 8), "positions": index, "rows": index} | change
    with pytest.raises((ValueError, IndexError), match=message):
        operation(**given)


def test_entries_that_are_not_there_are_refused():
    index = torch.tensor([0, 1])
    with pytest.raises(IndexError, match=r"entries must be in 0\.\.2"):
        keep_rows_(torch.ones(3, 8), torch.ones(2, 5, 8), index, index, entries=torch.tensor([0, 3]))
