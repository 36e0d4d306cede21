"""plan_pass, pack_pass, with_masked_window."""

from itertools import product

import pytest
import torch

from dkv import kernels
from dkv.kernels import use_backend
from dkv.kernels.plan.reference import KINDS
from tests.kernels.steps import Rows
from tests.kernels.sweeps import sweep

FLAGS = list(product([False, True], repeat=2))


SIZES = [(1, 1), (1, 13), (3, 8), (4, 21)]


def same(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))


@pytest.mark.parametrize(("size", "kind", "flags"), sweep(SIZES, KINDS, FLAGS))
def test_plan(size, kind, flags, backend):
    for shifted, everything in FLAGS:
        dynamic, by_chance = flags
        rows = Rows.random(*size)
        given, others = rows.plan(kind, everything, dynamic=dynamic, by_chance=by_chance, shifted=shifted)
        with use_backend("reference"):
            expected = kernels.plan_pass(*given, **others)
        same(kernels.plan_pass(*given, **others), expected)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_pack(size, shifted, backend):
    """With room for all, for more, or for fewer: then the last ones are left out."""
    slots = size[1]
    for filling in (0, 1, 5, -1, -slots):
        rows = Rows.random(*size)
        given, others = rows.plan(shifted=shifted)
        active, scored, _, _, report = kernels.plan_pass(*given, **others)
        totals = (max(int(x.sum()) + filling, 0) for x in report[:2])
        given = (rows.state.tokens, active, scored, rows.lengths, report, *totals)
        with use_backend("reference"):
            expected = kernels.pack_pass(*given, shifted=shifted)
        same(kernels.pack_pass(*given, shifted=shifted), expected)


@pytest.mark.parametrize("window", [0, 1, 4, 30])
@pytest.mark.parametrize("size", SIZES)
def test_window(size, window, backend):
    rows, slots = size
    for count in (0, 1, 3, slots):
        chosen, masked = torch.rand(size) < 0.2, Rows.random(*size).state.masked
        centers = torch.randint(slots, (rows, count))
        centers[torch.arange(count) >= torch.randint(count + 1, (rows, 1))] = slots
        with use_backend("reference"):
            expected = kernels.with_masked_window(chosen, masked, centers, window)
        same([kernels.with_masked_window(chosen, masked, centers, window)], [expected])
