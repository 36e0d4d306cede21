"""The operations on the state of the rows where a row has several tiles of slots, in Triton's interpreter."""

from dataclasses import dataclass

import pytest
import torch

from dkv import kernels
from dkv.kernels.commit.reference import RULES, Rules, State
from dkv.kernels.common.backend import has_triton, interpreted
from dkv.kernels.plan.reference import FIELDS, KINDS
from tests.kernels.steps import HOW, Rows

if not (has_triton() and interpreted()):
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from dkv.kernels.common.launch import Launch


@dataclass(frozen=True)
class Long:
    """Rows of `slots` slots, and of how many of these to fill a block has.

    `tile` is that of masks; `pair` that of the slots that a step is taken with, and of those they are compared with.
    """

    rows: int
    slots: int
    block: int
    tile: int
    pair: tuple[int, int]


# No multiples of a tile. Tiles are large, as the interpreter's cost is per tile.
QUICK, MOST = Long(2, 1501, 1501, 512, (512, 512)), Long(1, 32768 + 5, 2000, 8192, (1024, 1024))
lengths = pytest.mark.parametrize(
    "long", [QUICK, pytest.param(MOST, marks=pytest.mark.slow)], ids=lambda long: f"S{long.slots}"
)


def same(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x is y is None or (x.dtype == y.dtype and torch.equal(x, y))


@lengths
@pytest.mark.parametrize("kind", KINDS)
def test_plan_and_pack(long, kind, interpreted):
    rows, launch = Rows.random(long.rows, long.slots, finished=False), Launch((long.tile,), 4)
    given, others = rows.plan(kind, shifted=True)
    found = kernels.plan_pass(*given, **others)
    same(interpreted.plan_pass(*given, **others, launch=launch), found)
    active, scored, _, _, report = found
    given = rows.state.tokens, active, scored, rows.lengths, report, int(report[0].sum()) + 700, long.slots * long.rows
    expected = kernels.pack_pass(*given, shifted=True)
    same(interpreted.pack_pass(*given, shifted=True, launch=launch), expected)


@lengths
def test_window(long, interpreted):
    chosen = torch.rand(long.rows, long.slots) < 0.2
    masked, ends = Rows.random(long.rows, long.slots).state.masked, [0, long.slots - 1, long.slots]
    # A window within a tile, and one that spans several.
    for window in (4, long.slots // 3):
        given = chosen, masked, torch.tensor([ends] * long.rows), window
        launch = Launch((long.tile,), 4)
        same([interpreted.with_masked_window(*given, launch=launch)], [kernels.with_masked_window(*given)])


@lengths
@pytest.mark.parametrize("rule", RULES)
def test_advance(long, rule, interpreted):
    rows = Rows.random(long.rows, long.slots, finished=False)
    start, stop = (FIELDS.index(name) for name in ("start", "stop"))
    rows.state.now[:, stop] = rows.state.now[:, start] + long.block
    passed, choice = rows.passed("window", filling=3)
    given = rows.table, passed, choice, Rules(torch.tensor([25]), 7, rule, **HOW[rule])
    expected, found = rows.copy(), rows.copy()
    kernels.advance_(expected, *given)
    interpreted.advance_(found, *given, launch=Launch(long.pair, 4))
    for name, x, y in zip(State._fields, found, expected, strict=True):
        assert torch.equal(x, y), name
