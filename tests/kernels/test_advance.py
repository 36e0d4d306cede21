"""advance_."""

import pytest
import torch

from dkv import kernels
from dkv.kernels import use_backend
from dkv.kernels.commit.reference import RULES, Rules, State
from dkv.kernels.plan.reference import KINDS
from tests.kernels.steps import HOW, Rows
from tests.kernels.sweeps import sweep

SIZES = [(1, 1), (1, 13), (3, 8), (4, 21)]


def check(rows: Rows, passed, choice, rules: Rules) -> State:
    expected, found = rows.copy(), rows.copy()
    with use_backend("reference"):
        kernels.advance_(expected, rows.table, passed, choice, rules)
    kernels.advance_(found, rows.table, passed, choice, rules)
    for name, x, y in zip(State._fields, found, expected, strict=True):
        assert torch.equal(x, y), name
    return found


@pytest.mark.parametrize(("size", "kind", "rule", "finite_only"), sweep(SIZES, KINDS, RULES, [False, True]))
def test_any_step(size, kind, rule, finite_only, backend):
    for ends in (None, torch.tensor([1, 2, 25])):
        rows = Rows.random(*size)
        # Of ends there are some where rows have bounds of their own.
        passed, choice = rows.passed(kind, filling=int(torch.randint(4, ())), by_row=ends is not None)
        check(rows, passed, choice, Rules(ends, 77, rule, finite_only=finite_only, **HOW[rule]))
