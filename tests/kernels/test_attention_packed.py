"""cached_attention of packed rows: each gives what it gives alone, whatever stands between and behind them."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from dkv.kernels import cached_attention, use_backend
from dkv.kernels.common.backend import chosen
from tests.kernels.sweeps import sweep

NAN = float("nan")
# The queries of the rows, entries of no row between and behind them, slots, Hq and Hkv heads, D head size
SHAPES = [
    ((5,), 0, 0, 9, 2, 2, 16),
    ((0, 1, 7, 3), 0, 5, 21, 4, 2, 24),
    ((4, 4, 4), 0, 0, 17, 4, 4, 16),
    ((1, 0, 0, 18), 2, 0, 37, 7, 1, 32),
    ((0, 0), 0, 3, 5, 2, 1, 16),
    ((3, 20, 2), 1, 4, 65, 6, 3, 16),
]
RULES = [(), ("key_ranges",), ("key_mask",), ("key_gaps",), ("key_ranges", "key_gaps"), ("key_ranges", "key_mask")]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def packed(shape, names=(), dtype=torch.float32, integer=torch.int64, order=None) -> dict:
    """Arguments; what is of no row is NaN, and so is what is hidden."""
    lengths, gap, filling, slots, hq, hkv, d = shape
    batch, starts, at = len(lengths), [0] * len(lengths), gap
    for row in order or range(batch):
        starts[row], at = at, at + lengths[row] + gap
    args = {
        "q": torch.full((at + filling, hq, d), NAN, dtype=dtype),
        "k_buf": torch.randn(batch, slots, hkv, d).to(dtype),
        "v_buf": torch.randn(batch, slots, hkv, d).to(dtype),
        "query_starts": torch.tensor(starts, dtype=integer),
        "query_lengths": torch.tensor(lengths, dtype=integer),
    }
    seen = torch.ones(batch, slots, dtype=torch.bool)
    if "key_ranges" in names:
        ranges = torch.randint(0, slots + 1, (batch, 2)).sort(1).values
        ranges[-1] = torch.tensor([slots // 2, slots // 2 if batch > 1 else slots])
        slot = torch.arange(slots)
        args["key_ranges"], seen = ranges.to(integer), seen & (slot >= ranges[:, :1]) & (slot < ranges[:, 1:])
    if "key_gaps" in names:
        gaps = torch.randint(0, slots + 1, (batch, 2)).sort(1).values
        slot = torch.arange(slots)
        args["key_gaps"], seen = gaps.to(integer), seen & ((slot < gaps[:, :1]) | (slot >= gaps[:, 1:]))
    if "key_mask" in names:
        args["key_mask"] = torch.rand(batch, slots) < 0.6
        seen = seen & args["key_mask"]
    for name in ("k_buf", "v_buf"):
        args[name][~seen] = NAN
    for own in entries(args):
        args["q"][own] = torch.randn(own.stop - own.start, hq, d).to(dtype)
    return args


def entries(args: dict) -> list[slice]:
    places = zip(args["query_starts"].tolist(), args["query_lengths"].tolist(), strict=True)
    return [slice(start, start + length) for start, length in places]


def rows_alone(args: dict, dtype: torch.dtype, **options) -> tuple[Tensor, Tensor]:
    """What the definition gives for each row as a batch of one, [rows * queries, Hq, D] and without D."""
    found = []
    for row, own in enumerate(entries(args)):
        one = slice(row, row + 1)
        rules = {name: args[name][one] for name in ("key_ranges", "key_gaps", "key_mask") if name in args}
        tensors = args["q"][own].unsqueeze(0), args["k_buf"][one], args["v_buf"][one]
        with use_backend("reference"):
            found.append(cached_attention(*(x.to(dtype) for x in tensors), return_lse=True, **rules, **options))
    return torch.cat([out[0] for out, _ in found]), torch.cat([lse[0] for _, lse in found])


def of_rows(args: dict, x: Tensor) -> Tensor:
    return torch.cat([x[own] for own in entries(args)])


def compare(assert_close, args: dict, call=cached_attention, **options) -> None:
    scale = {name: x for name, x in options.items() if name == "scale"}
    exact, exact_lse = rows_alone(args, torch.float64, **scale)
    rough, _ = rows_alone(args, torch.float32 if args["q"].dtype == torch.float64 else args["q"].dtype, **scale)
    _, rough_lse = rows_alone(args, torch.float32, **scale)
    out, lse = call(**args, return_lse=True, **options)
    assert out.shape == args["q"].shape and lse.shape == out.shape[:2]
    assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
    assert_close(of_rows(args, lse), exact_lse, rough_lse)
    # For a kernel the log-sum-exp is no more than another store.
    for x in (out,) if call is not cached_attention or chosen() == "triton" else (out, call(**args, **options)):
        assert x.dtype == args["q"].dtype
        assert_close(of_rows(args, x), exact, rough)


@pytest.fixture(params=["rows one by one", "rows side by side"])
def reading(request, monkeypatch) -> None:
    """The torch backend as on a CPU, where lengths may be read, and as on a GPU."""
    if "side" in request.param:
        monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)


@pytest.mark.parametrize(("shape", "names"), sweep(SHAPES, RULES, quick=4))
def test_each_row_as_alone(shape, names, backend, assert_close):
    compare(assert_close, packed(shape, names))


@pytest.mark.parametrize(("shape", "names"), sweep(SHAPES, RULES, quick=1))
def test_in_torch(shape, names, reading, assert_close):
    args, most = packed(shape, names), max(shape[0])
    with use_backend("torch"):
        for options in ({}, {"most_queries": most}, {"most_queries": most + 100}):
            compare(assert_close, args, **options)


@pytest.mark.parametrize(("shape", "dtype"), sweep(SHAPES[1:4], DTYPES[1:], quick=2))
def test_dtypes(shape, dtype, backend, assert_close):
    compare(assert_close, packed(shape, ("key_ranges",), dtype), scale=0.3)


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i > 1 else ()) for i in range(12)])
def test_random_rows(seed, backend, assert_close):
    rng = random.Random(seed)
    lengths = tuple(rng.choice((0, 1, rng.randint(2, 40))) for _ in range(rng.randint(1, 5)))
    heads, size = rng.choice(((1, 1), (4, 2), (7, 1), (3, 3))), rng.choice((16, 40, 64))
    shape = (lengths, rng.randint(0, 2), rng.randint(0, 9), rng.randint(1, 70), *heads, size)
    order = rng.sample(range(len(lengths)), len(lengths))
    compare(assert_close, packed(shape, rng.choice(RULES), order=order), most_queries=max(lengths) + rng.randint(0, 20))


# Queries by slots of a tile, and how many programs the slots are divided among.
LAUNCHES = [((16, 16), 1), ((16, 16), 4), ((32, 16), 2), ((16, 64), 2)]


@pytest.mark.parametrize(("shape", "how"), sweep(SHAPES, LAUNCHES, quick=4))
def test_tiles_and_parts(shape, how, interpreted, assert_close):
    """Rows one after the other and in reverse: what a tile wrote behind its row would spoil another one."""
    from dkv.kernels.common.launch import Launch

    call = partial(interpreted.cached_attention, launch=Launch(how[0], 4), parts=how[1])
    for order in (None, range(len(shape[0]))[::-1]):
        compare(assert_close, packed(shape, ("key_ranges",), order=order), call, most_queries=max(shape[0]))


def test_rows_in_any_order_of_entries(backend, assert_close):
    compare(assert_close, packed(SHAPES[1], ("key_ranges",), order=(2, 0, 3, 1)), most_queries=7)


def test_a_batch_without_entries_or_rows_or_slots(backend):
    for shape in (((0, 0), 0, 0, 5, 2, 1, 16), ((), 0, 3, 5, 2, 1, 16), ((), 0, 0, 5, 2, 1, 16)):
        args = packed(shape)
        out, lse = cached_attention(**args, return_lse=True)
        assert out.shape == args["q"].shape and lse.shape == out.shape[:2]
    args = packed(((2, 1), 0, 2, 0, 2, 1, 16))
    out, lse = cached_attention(**args, return_lse=True)
    assert (out[:3] == 0).all() and (lse[:3] == -torch.inf).all()
    assert (cached_attention(**args)[:3] == 0).all()


def test_A10_int32_and_int64_give_the_same(backend):
    args = packed(SHAPES[1], ("key_ranges",))
    narrow = {name: x.int() if x.dtype == torch.int64 else x for name, x in args.items()}
    found, expected = (of_rows(x, cached_attention(**x)) for x in (narrow, args))
    assert torch.equal(found, expected)


def test_A07_strides(restride, backend):
    args = packed(SHAPES[1])
    strided = {name: restride(args[name]) for name in ("q", "k_buf", "v_buf")}
    strided |= {name: torch.stack([args[name]] * 2, -1)[:, 0] for name in ("query_starts", "query_lengths")}
    torch.testing.assert_close(of_rows(args, cached_attention(**strided)), of_rows(args, cached_attention(**args)))


@pytest.mark.parametrize("return_lse", [False, True])
def test_nothing_is_read_back(return_lse, no_readback, monkeypatch):
    args = packed(SHAPES[1], ("key_ranges",))
    monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)
    with use_backend("torch"), no_readback():
        cached_attention(**args, return_lse=return_lse, most_queries=7)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], ((40, 40), 0, 0, 9, 2, 2, 16)], ids=["one row", "few", "some"])
def test_equal_rows_are_a_view_of_a_dense_batch(shape):
    """In torch with the same bits as [B, N, Hq, D]."""
    args = packed(shape)
    dense = args["q"].unflatten(0, (len(shape[0]), -1))
    with use_backend("torch"):
        expected = cached_attention(dense, args["k_buf"], args["v_buf"])
        assert torch.equal(cached_attention(**args), expected.flatten(0, 1))


@pytest.mark.parametrize("names", [(), ("key_ranges", "key_mask")], ids=str)
def test_gradients_are_those_of_the_rows_alone(names, reading):
    args = packed(SHAPES[1], names)
    weights = torch.randn(sum(SHAPES[1][0]), *args["q"].shape[1:])

    def gradients(function) -> list[Tensor]:
        leaves = {name: args[name].clone().requires_grad_() for name in ("q", "k_buf", "v_buf")}
        out = function(args | leaves)
        return list(torch.autograd.grad((out * weights).sum(), leaves.values()))

    with use_backend("torch"):
        found = gradients(lambda x: of_rows(x, cached_attention(**x)))
    expected = gradients(lambda x: rows_alone(x, torch.float32)[0])
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(x.nan_to_num(), y.nan_to_num(), rtol=1e-4, atol=1e-5)
        assert i or x.isfinite().all()


def indices(*values: int, dtype=torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 16)}, r"^q must have shape \[any, any, any\], got \[2, 3, 4, 16\]"),
        ({"query_starts": None}, r"^q must have shape \[any, any, any, any\], got \[5, 4, 16\]"),
        ({"query_starts": indices(0)}, r"^query_starts must have shape \[2\]"),
        ({"query_starts": torch.zeros(2)}, r"^query_starts must be int32, int64, got float32"),
        ({"query_starts": torch.zeros(2, dtype=torch.int64, device="meta")}, r"^query_starts is on meta but q is on"),
        ({"query_lengths": None}, r"^query_starts without query_lengths: give the number of queries of each row"),
        ({"query_lengths": indices(1, 2, 2)}, r"^query_lengths must have shape \[2\]"),
        ({"most_queries": -1}, r"^most_queries must be at least 0, got -1"),
        ({"mask": torch.ones(2, 5, 7, dtype=torch.bool)}, r"^mask does not go with query_starts: give q as \[B, N"),
        ({"block_ids": (indices(0), indices(0))}, r"^block_ids does not go with query_starts"),
        ({"key_ranges": indices(0, 5)}, r"^key_ranges must have shape \[2, 2\]"),
    ],
)
def test_arguments_are_checked(changes, message):
    args = packed(((2, 3), 0, 0, 7, 4, 2, 16))
    cached_attention(**args)
    with pytest.raises(ValueError, match=message):
        cached_attention(**args | changes)


def test_most_queries_of_a_dense_batch_is_refused():
    q = torch.zeros(2, 3, 4, 16)
    with pytest.raises(ValueError, match=r"^most_queries is of packed queries: give query_starts too, or leave it out"):
        cached_attention(q, q, q, most_queries=3)
