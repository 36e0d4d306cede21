"""rope_scatter_ of packed entries: each goes where it goes in a batch."""

import pytest
import torch
from torch import Tensor

from dkv.kernels import rope_scatter_, use_backend
from tests.kernels.sweeps import sweep
from tests.kernels.test_rope_scatter import DTYPES, OPTIONS, cast, inputs, options, plain

# N entries, B rows, S slots, Hq and Hkv heads, D head size
SHAPES = [(1, 1, 2, 1, 1, 16), (7, 3, 9, 4, 2, 80), (40, 2, 50, 7, 1, 32)]


def packed(shape, names=(), dtype=torch.float32, table=torch.float32) -> dict:
    """Entries of all rows in any order; an entry in 3, which fills up, names the last slot of its row."""
    n, b, s, hq, hkv, d = shape
    args = inputs((1, n, s, hq, hkv, d), dtype, table) | options((1, n, s, hq, hkv, d), names, dtype)
    for name in ("k_buf", "v_buf"):
        args[name] = torch.randn(b, s, hkv, d).to(dtype)
    entry = {name: args[name][0] for name in ("q", "k", "v", "query_positions") if name in args}
    place = torch.randperm(b * (s - 1))[:n]
    entry |= {"rows": place // (s - 1), "positions": place % (s - 1)}
    entry["positions"][2::3] = s - 1
    return args | entry


def one_by_one(args: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values of all slots but the last, every entry as a batch of its own."""
    alone, out = dict(args), []
    rows, places = alone.pop("rows"), alone.get("query_positions", args["positions"])
    for i, row in enumerate(rows.tolist()):
        entry = {name: args[name][None, i : i + 1] for name in ("q", "k", "v", "positions")}
        of_row = {name: alone[name][row : row + 1] for name in ("k_buf", "v_buf")}
        found, *written = plain(**alone | entry | of_row | {"query_positions": places[None, i : i + 1]})
        out.append(found[0])
        for name, x in zip(of_row, written, strict=True):
            alone[name] = torch.cat([alone[name][:row], x, alone[name][row + 1 :]])
    return torch.cat(out), *(alone[name][:, :-1] for name in ("k_buf", "v_buf"))


@pytest.mark.parametrize(
    ("shape", "names", "dtype"), sweep(SHAPES, [[], *([name] for name in OPTIONS), OPTIONS], DTYPES, quick=3)
)
def test_each_entry_as_alone(shape, names, dtype, backend, assert_close):
    args = packed(shape, names, dtype)
    exact = one_by_one(cast(args, torch.float64))
    rough = one_by_one(cast(args, torch.float32) if dtype == torch.float64 else args)
    out = rope_scatter_(**args)
    assert out.dtype == dtype and out.shape == args["q"].shape
    for found, *expected in zip((out, *(args[x][:, :-1] for x in ("k_buf", "v_buf"))), exact, rough, strict=True):
        assert_close(found, *expected)


def test_a_dense_batch_is_a_packed_one(backend):
    args, extra = inputs((3, 5, 11, 4, 2, 32)), options((3, 5, 11, 4, 2, 32), OPTIONS)
    flat = {name: x.flatten(0, 1) for name, x in (args | extra).items() if name in ("q", "k", "v", "positions")}
    flat |= {"query_positions": extra["query_positions"].flatten(), "rows": torch.arange(3).repeat_interleave(5)}
    own = {name: args[name].clone() for name in ("k_buf", "v_buf")}
    found = rope_scatter_(**args | extra | flat | own)
    assert torch.equal(found, rope_scatter_(**args, **extra).flatten(0, 1))
    for name, x in own.items():
        assert torch.equal(x, args[name])


def test_fewer_queries_than_keys(backend):
    args = packed(SHAPES[1])
    expected = rope_scatter_(**args)
    args["q"], some = args["q"][[5, 1]], args["positions"][[5, 1]]
    assert torch.equal(rope_scatter_(**args, query_positions=some), expected[[5, 1]])
    assert rope_scatter_(**args | {"q": args["q"][:0]}, query_positions=some[:0]).shape == (0, 4, 80)


def test_strides(restride, backend):
    args = packed(SHAPES[1], OPTIONS)
    strided = {name: restride(args[name]) for name in ("q", "k", "v", "cos", "sin", "k_buf", "v_buf")}
    strided |= {name: torch.stack([args[name]] * 2, -1)[:, 0] for name in ("positions", "rows", "query_positions")}
    torch.testing.assert_close(rope_scatter_(**args | strided), rope_scatter_(**args))


def test_only_the_named_slots_are_written(backend):
    args = packed(SHAPES[1], OPTIONS)
    for name in ("k_buf", "v_buf"):
        args[name] = torch.full(args[name].shape, torch.nan)
    rope_scatter_(**args)
    named = torch.zeros(args["k_buf"].shape[:2], dtype=torch.bool)
    named[args["rows"], args["positions"]] = True
    for name in ("k_buf", "v_buf"):
        assert torch.equal(args[name].isfinite().all((2, 3)), named)


def test_nothing_is_read_back(no_readback):
    args = packed(SHAPES[1], OPTIONS)
    with use_backend("torch"), no_readback():
        rope_scatter_(**args, validate=False)


def test_A10_int32_and_int64_give_the_same(backend):
    args = packed(SHAPES[1], OPTIONS)
    narrow = {name: x.int() if x.dtype == torch.int64 else x.clone() for name, x in args.items() if "norm" not in name}
    assert torch.equal(rope_scatter_(**args | narrow), rope_scatter_(**args))


@pytest.mark.parametrize("row", [-1, 3])
def test_A19_rows_outside(row, backend):
    args = packed(SHAPES[1])
    args["rows"][2] = row
    with pytest.raises(IndexError, match=rf"^rows must be in 0\.\.2, got {row}$"):
        rope_scatter_(**args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 7, 4, 80)}, r"^q must have shape \[any, any, any\]"),
        ({"rows": None}, r"^q must have shape \[any, any, any, any\], got \[7, 4, 80\]"),
        ({"q": torch.zeros(6, 4, 80)}, r"^q has 6 entries and k has 7: give query_positions"),
        ({"k": torch.zeros(7, 80)}, r"^k must have shape \[any, any, 80\]"),
        ({"v": torch.zeros(6, 2, 80)}, r"^v must have shape \[7, 2, 80\]"),
        ({"positions": torch.zeros(1, 7).long()}, r"^positions must have shape \[7\]"),
        ({"rows": torch.zeros(6).long()}, r"^rows must have shape \[7\]"),
        ({"rows": torch.zeros(7)}, r"^rows must be int32, int64, got float32"),
        ({"rows": torch.zeros(7, device="meta").long()}, r"^rows is on meta but q is on cpu"),
        ({"k_buf": torch.zeros(3, 9, 1, 80)}, r"^k_buf must have shape \[any, any, 2, 80\]"),
        ({"query_positions": torch.zeros(6).long()}, r"^query_positions must have shape \[7\]"),
    ],
)
def test_arguments_are_checked(changes, message):
    args = packed(SHAPES[1])
    rope_scatter_(**args)
    with pytest.raises(ValueError, match=message):
        rope_scatter_(**args | changes)
