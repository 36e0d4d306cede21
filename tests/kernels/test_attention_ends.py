"""cached_attention with ends: of the slots of its row a packed query sees those before its own end alone."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from dkv.kernels import cached_attention, use_backend
from dkv.kernels.common.backend import chosen
from dkv.kernels.common.launch import Launch
from tests.kernels.sweeps import sweep
from tests.kernels.test_attention_packed import entries, of_rows, packed

NAN = float("nan")
# The queries of the rows, entries of no row between and behind them, slots, Hq and Hkv heads, D head size
SHAPES = [
    ((5,), 0, 0, 9, 2, 2, 16),
    ((0, 1, 7, 3), 0, 5, 21, 4, 2, 24),
    ((1, 0, 0, 7), 2, 0, 37, 7, 1, 32),
    ((0, 0), 0, 3, 5, 2, 1, 16),
    ((18, 9, 2), 1, 4, 41, 2, 1, 16),
]
RULES = [(), ("key_ranges",), ("key_gaps",), ("key_mask",), ("key_ranges", "key_gaps")]
# The slots of a block; 0: ends in no order, some of which lie outside of the slots
BLOCKS = [1, 4, 16, 0]


def with_ends(shape, block: int, names=(), dtype=torch.float32) -> dict:
    """Packed rows whose queries stand in the last slots; slots that no query of a row sees are NaN."""
    args, slots = packed(shape, names, dtype), shape[3]
    ends = torch.randint(-3, slots + 9, (len(args["q"]),))
    for row, own in enumerate(entries(args)):
        if block:
            slot = torch.arange(slots)[-(own.stop - own.start) :] if own.stop > own.start else torch.zeros(0).long()
            ends[own][: len(slot)] = (slot // block + 1) * block
        last = max([0, *ends[own].tolist()])
        for name in ("k_buf", "v_buf"):
            args[name][row, last:] = NAN
    return args | {"query_ends": ends}


def by_mask(args: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition for each query as a batch of its own, whose end is written as a mask of slots."""
    out, lse = args["q"].new_zeros(args["q"].shape, dtype=dtype), args["q"].new_zeros(args["q"].shape[:2], dtype=dtype)
    lse, slots = lse.to(torch.promote_types(dtype, torch.float32)), torch.arange(args["k_buf"].shape[1])
    for row, own in enumerate(entries(args)):
        one = slice(row, row + 1)
        rules = {name: args[name][one] for name in ("key_ranges", "key_gaps") if name in args}
        buffers = [args[name][one].to(dtype) for name in ("k_buf", "v_buf")]
        for i in range(own.start, own.stop):
            seen = (slots < args["query_ends"][i])[None]
            if "key_mask" in args:
                seen = seen & args["key_mask"][one]
            with use_backend("reference"):
                found = cached_attention(
                    args["q"][None, i : i + 1].to(dtype), *buffers, **rules, key_mask=seen, return_lse=True
                )
            out[i], lse[i] = found[0][0, 0], found[1][0, 0]
    return out, lse


def compare(assert_close, args: dict, call=cached_attention) -> None:
    exact, exact_lse = (of_rows(args, x) for x in by_mask(args, torch.float64))
    wide = args["q"].dtype == torch.float64
    rough, _ = (of_rows(args, x) for x in by_mask(args, torch.float32 if wide else args["q"].dtype))
    _, rough_lse = (of_rows(args, x) for x in by_mask(args, torch.float32))
    out, lse = call(**args, return_lse=True)
    assert_close(of_rows(args, lse), exact_lse, rough_lse)
    # For a kernel the log-sum-exp is no more than another store.
    for found in (out,) if call is not cached_attention or chosen() == "triton" else (out, call(**args)):
        assert_close(of_rows(args, found), exact, rough)


@pytest.fixture(params=["end by end", "with a mask", "side by side"])
def reading(request, monkeypatch) -> None:
    """The ways of the torch backend: two as on a CPU, where ends may be read, and the one of a GPU."""
    monkeypatch.setattr("dkv.kernels.attention.torch.QUERIES_OF_AN_END", 0 if "end" in request.param else 1000)
    if "side" in request.param:
        monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)


@pytest.mark.parametrize(("shape", "block", "names"), sweep(SHAPES, BLOCKS, RULES, quick=5))
def test_each_query_as_alone(shape, block, names, backend, assert_close):
    compare(assert_close, with_ends(shape, block, names))


@pytest.mark.parametrize(("shape", "block", "names"), sweep(SHAPES, BLOCKS, RULES, quick=5))
def test_in_torch(shape, block, names, reading, assert_close):
    with use_backend("torch"):
        compare(assert_close, with_ends(shape, block, names))


@pytest.mark.parametrize(("block", "dtype"), sweep(BLOCKS, [torch.float64, torch.float16, torch.bfloat16], quick=2))
def test_dtypes(block, dtype, backend, assert_close):
    compare(assert_close, with_ends(SHAPES[1], block, ("key_ranges",), dtype))


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i > 1 else ()) for i in range(16)])
def test_random_rows(seed, backend, assert_close):
    rng = random.Random(seed)
    lengths = tuple(rng.choice((0, 1, rng.randint(2, 40))) for _ in range(rng.randint(1, 4)))
    heads, size = rng.choice(((1, 1), (4, 2), (7, 1), (3, 3))), rng.choice((16, 40, 64))
    shape = (lengths, rng.randint(0, 2), rng.randint(0, 9), rng.randint(1, 70), *heads, size)
    compare(assert_close, with_ends(shape, rng.choice(BLOCKS), rng.choice(RULES)))


# Queries by slots of a tile, and how many programs the slots are divided among.
LAUNCHES = [((16, 16), 1), ((16, 16), 4), ((32, 16), 2), ((16, 64), 2)]


@pytest.mark.parametrize(("shape", "how", "block", "names"), sweep(SHAPES[1:], LAUNCHES, BLOCKS, RULES, quick=17))
def test_tiles_and_parts(shape, how, block, names, interpreted, assert_close):
    call = partial(interpreted.cached_attention, launch=Launch(how[0], 4), parts=how[1])
    compare(assert_close, with_ends(shape, block, names), call)


@pytest.mark.parametrize(("name", "strange"), [("k_buf", NAN), ("v_buf", NAN), ("v_buf", float("inf"))])
@pytest.mark.parametrize("block", [1, 4])
def test_a_strange_number_is_met_by_those_that_see_it_alone(block, name, strange, backend):
    args = with_ends(SHAPES[4], block)
    args[name][:, 30, 0, 3] = strange
    exact, found = (of_rows(args, x) for x in (by_mask(args, torch.float64)[0], cached_attention(**args)))
    met = ~exact.isfinite()
    assert met.any() and torch.equal(met, ~found.isfinite())
    torch.testing.assert_close(found[~met].double(), exact[~met], rtol=1e-4, atol=1e-5)


def test_ends_behind_the_last_slot_hide_nothing(backend):
    args = packed(SHAPES[4], ("key_ranges",))
    ends = torch.full((len(args["q"]),), SHAPES[4][3])
    found = cached_attention(**args, query_ends=ends)
    assert torch.equal(of_rows(args, found), of_rows(args, cached_attention(**args)))


def test_a_query_that_sees_nothing(backend):
    args = with_ends(SHAPES[4], 4)
    args["query_ends"][entries(args)[0]] = 0
    args["query_ends"][entries(args)[1]][3] = -1
    out, lse = cached_attention(**args, return_lse=True)
    for blind in (entries(args)[0], entries(args)[1].start + 3):
        assert (out[blind] == 0).all() and (lse[blind] == -torch.inf).all()
    assert (lse[entries(args)[2]] > -torch.inf).all()


@pytest.mark.parametrize("block", [1, 4, 16])
def test_a_row_alone_and_in_company_gives_the_same_bits(block, backend):
    args = with_ends(SHAPES[4], block, ("key_ranges",))
    found = cached_attention(**args)
    for row, own in enumerate(entries(args)):
        one = {name: args[name][row : row + 1] for name in ("k_buf", "v_buf", "key_ranges", "query_lengths")}
        one |= {"q": args["q"][own], "query_ends": args["query_ends"][own], "query_starts": torch.zeros(1).long()}
        # The tiles of a kernel are those of the longest row, and the order of its sums.
        assert torch.equal(cached_attention(**one, most_queries=len(args["q"])), found[own])


def test_strides_and_int32(restride, backend):
    args = with_ends(SHAPES[1], 4)
    other = args | {"query_ends": torch.stack([args["query_ends"].int()] * 2, -1)[:, 0]}
    other |= {name: restride(args[name]) for name in ("q", "k_buf", "v_buf")}
    torch.testing.assert_close(of_rows(args, cached_attention(**other)), of_rows(args, cached_attention(**args)))


def test_nothing_is_read_back(no_readback, monkeypatch):
    args = with_ends(SHAPES[1], 4, ("key_ranges",))
    monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)
    with use_backend("torch"), no_readback():
        cached_attention(**args, return_lse=True, most_queries=7)


@pytest.mark.parametrize("block", [0, 4])
def test_gradients(block, reading):
    args = with_ends(SHAPES[1], block)
    weights = torch.randn(sum(SHAPES[1][0]), *args["q"].shape[1:])

    def gradients(call, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: args[name].to(dtype).requires_grad_() for name in ("q", "k_buf", "v_buf")}
        out = of_rows(args, call(args | leaves)).to(dtype)
        return [x.nan_to_num() for x in torch.autograd.grad((out * weights).sum(), list(leaves.values()))]

    with use_backend("torch"):
        found = gradients(lambda x: cached_attention(**x), torch.float32)
    exact = gradients(lambda x: by_mask(x, torch.float64)[0], torch.float64)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_ends": torch.zeros(4).long()}, r"^query_ends must have shape \[5\], got \[4\]"),
        ({"query_ends": torch.zeros(5)}, r"^query_ends must be int32, int64, got float32"),
        ({"query_ends": torch.zeros(5, device="meta").long()}, r"^query_ends is on meta but q is on cpu"),
        ({"q": torch.zeros(2, 3, 4, 16), "query_starts": None}, r"^query_ends are of packed queries: give query_star"),
    ],
)
def test_arguments_are_checked(changes, message):
    args = with_ends(((2, 3), 0, 0, 7, 4, 2, 16), 4)
    cached_attention(**args)
    with pytest.raises(ValueError, match=message):
        cached_attention(**args | changes)
