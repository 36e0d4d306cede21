"""attention_mass: every row as alone, against float64, and against the attention that it sums."""

import math
import random
from functools import partial

import pytest
import torch
from torch import Tensor

from dkv.kernels import Stored, Workspace, attention_mass, cached_attention, use_backend
from dkv.kernels.attention import products
from dkv.kernels.attention.op import ATTENTION
from dkv.kernels.attention.reference import Rules
from dkv.kernels.attention.shares import Shares
from dkv.kernels.mass.op import MASS
from tests.kernels.sweeps import sweep

NAN, INF = float("nan"), float("inf")
# The queries of the rows, entries of no row between and behind them, slots, Hq and Hkv heads, D head size
SHAPES = [
    ((5,), 0, 0, 9, 2, 2, 16),
    ((0, 1, 7, 3), 0, 5, 21, 4, 2, 24),
    ((4, 4, 4), 0, 0, 17, 4, 4, 16),
    ((1, 0, 0, 18), 2, 0, 37, 7, 1, 32),
    ((0, 0), 0, 3, 5, 2, 1, 16),
    ((3, 20, 2), 1, 4, 65, 6, 3, 16),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def numbers(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype)


def given(shape, ranged: bool = False, dtype=torch.float32, integer=torch.int64, order=None) -> dict:
    """Arguments; what is of no row is NaN, and so are hidden keys."""
    lengths, gap, filling, slots, hq, hkv, d = shape
    batch, starts, at, summed = len(lengths), [0] * len(lengths), gap, torch.promote_types(dtype, torch.float32)
    for row in order or range(batch):
        starts[row], at = at, at + lengths[row] + gap
    args = {
        "q": torch.full((at + filling, hq, d), NAN, dtype=dtype),
        "k_buf": numbers(batch, slots, hkv, d, dtype=dtype),
        "lse": torch.full((at + filling, hq), NAN, dtype=summed),
        "weight": torch.full((at + filling,), NAN, dtype=summed),
        "query_starts": torch.tensor(starts, dtype=integer),
        "query_lengths": torch.tensor(lengths, dtype=integer),
    }
    if ranged:
        ranges = torch.randint(0, slots + 1, (batch, 2)).sort(1).values
        ranges[-1] = torch.tensor([slots // 2, slots // 2 if batch > 1 else slots])
        args["key_ranges"] = ranges.to(integer)
        args["k_buf"][~visible(args)] = NAN
    for own in entries(args):
        args["q"][own] = numbers(own.stop - own.start, hq, d, dtype=dtype)
        args["weight"][own] = torch.rand(own.stop - own.start).to(summed)
    rules = {name: x for name, x in args.items() if name not in ("lse", "weight", "q", "k_buf")}
    with use_backend("reference"):
        _, lse = cached_attention(args["q"], args["k_buf"], args["k_buf"], return_lse=True, **rules)
    for own in entries(args):
        args["lse"][own] = lse[own]
    return args


def entries(args: dict) -> list[slice]:
    places = zip(args["query_starts"].tolist(), args["query_lengths"].tolist(), strict=True)
    return [slice(start, start + length) for start, length in places]


def visible(args: dict) -> Tensor:
    """bool [B, S]"""
    batch, slots = args["k_buf"].shape[:2]
    slot = torch.arange(slots)
    if "key_ranges" not in args:
        return torch.ones(batch, slots, dtype=torch.bool)
    return (slot >= args["key_ranges"][:, :1]) & (slot < args["key_ranges"][:, 1:])


def exact(args: dict, scale: float | None = None) -> Tensor:
    """The formula in float64, one query head after the other."""
    seen, heads = visible(args), args["q"].shape[1]
    key = args["k_buf"].double().masked_fill(~seen[:, :, None, None], 0)
    mass = torch.zeros(seen.shape, dtype=torch.float64)
    for row, own in enumerate(entries(args)):
        query, lse, weight = (args[name][own].double() for name in ("q", "lse", "weight"))
        for head in range(heads):
            of_head = key[row, :, head // (heads // key.shape[2])]
            scores = query[:, head] @ of_head.T * (args["q"].shape[2] ** -0.5 if scale is None else scale)
            share = torch.exp(scores - lse[:, head, None]).where(lse[:, head, None] > -INF, 0)
            mass[row] += weight @ share / heads
    return mass.where(seen, 0)


def check(args: dict, call=attention_mass, **options) -> Tensor:
    scale = {name: x for name, x in options.items() if name == "scale"}
    found, expected = call(**args, **options), exact(args, **scale)
    assert found.dtype == args["lse"].dtype and found.shape == expected.shape
    # Scores of up to about 5 are rounded, which their exponentials multiply.
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=64 * eps, atol=64 * eps)
    assert (found[~visible(args)] == 0).all()
    return found


@pytest.fixture(params=["rows one by one", "rows side by side"])
def reading(request, monkeypatch) -> None:
    """The torch backend as on a CPU, where lengths may be read, and as on a GPU."""
    if "side" in request.param:
        monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)


@pytest.mark.parametrize(("shape", "ranged"), sweep(SHAPES, (False, True), quick=2))
def test_each_row_as_alone(shape, ranged, backend):
    check(given(shape, ranged))


@pytest.mark.parametrize(("shape", "ranged"), sweep(SHAPES, (False, True), quick=1))
def test_in_torch(shape, ranged, reading):
    args, most, work = given(shape, ranged), max(shape[0]), Workspace()
    with use_backend("torch"):
        for options in ({}, {"most_queries": most, "workspace": work}, {"most_queries": most + 100, "workspace": work}):
            check(args, **options)


@pytest.mark.parametrize(("shape", "dtype"), sweep(SHAPES[1:4], DTYPES[1:], quick=2))
def test_dtypes(shape, dtype, backend):
    check(given(shape, True, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_in_torch(dtype, reading):
    with use_backend("torch"):
        check(given(SHAPES[1], True, dtype))


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i > 1 else ()) for i in range(12)])
def test_random_rows(seed, backend):
    rng = random.Random(seed)
    lengths = tuple(rng.choice((0, 1, rng.randint(2, 40))) for _ in range(rng.randint(1, 5)))
    heads, size = rng.choice(((1, 1), (4, 2), (7, 1), (3, 3))), rng.choice((16, 40, 64))
    shape = (lengths, rng.randint(0, 2), rng.randint(0, 9), rng.randint(1, 70), *heads, size)
    order = rng.sample(range(len(lengths)), len(lengths))
    check(given(shape, rng.random() < 0.5, order=order), most_queries=max(lengths) + rng.randint(0, 20))


@pytest.mark.parametrize("scale", [0.0, 0.05, -0.3])
def test_scale(scale, backend):
    check(given(SHAPES[1]), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_share_the_weights_of_a_row(dtype, backend):
    """With the log-sum-exp of the attention, which sums over the visible slots."""
    args = given(SHAPES[1], True, dtype)
    rules = {name: args[name] for name in ("query_starts", "query_lengths", "key_ranges")}
    _, args["lse"] = cached_attention(args["q"], args["k_buf"], args["k_buf"], return_lse=True, **rules)
    weights = torch.stack([args["weight"][own].sum() for own in entries(args)]).where(visible(args).any(1), 0)
    torch.testing.assert_close(attention_mass(**args).sum(1), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "ranged"), sweep(SHAPES, (False, True), quick=1))
@pytest.mark.parametrize("most", [products.MOST_SCORES, 600], ids=["at once", "in parts"])
def test_shares_that_attention_left(shape, ranged, most, monkeypatch):
    """They spare the products, and change the sums by roundings alone; the attention stays what it is."""
    monkeypatch.setattr(products, "MOST_SCORES", most)
    args, shares, queries = given(shape, ranged), Shares(), max(shape[0])
    q, k = args["q"].nan_to_num(), Stored(args["k_buf"])
    rules, scale = (
        Rules(args["query_lengths"], args.get("key_ranges"), query_starts=args["query_starts"]),
        shape[-1] ** -0.5,
    )
    with use_backend("torch"):
        expected, _ = ATTENTION(q, k, k, rules, queries, scale, True)
        found, lse = ATTENTION(q, k, k, rules, queries, scale, True, shares=shares)
        assert lse is None
        where = rules.query_starts, rules.query_lengths, rules.key_ranges, queries, scale
        mass = MASS(q, k, lse, args["weight"], *where, shares=shares)
    for own in entries(args):
        torch.testing.assert_close(found[own], expected[own])
    torch.testing.assert_close(mass.double(), exact(args), rtol=1e-5, atol=1e-5)


def test_shares_of_single_slots():
    """Each of them is what a slot gets of the query alone; of a row without queries or slots there are none."""
    args, shares = given(((5, 0, 9, 2), 1, 2, 37, 4, 2, 16), True), Shares()
    rules = Rules(args["query_lengths"], args["key_ranges"], query_starts=args["query_starts"])
    q, first = args["q"].nan_to_num(), args["key_ranges"][:, 0]
    slots = torch.stack((first, (args["key_ranges"][:, 1] - 1).maximum(first)))
    with use_backend("torch"):
        ATTENTION(q, *[Stored(args["k_buf"])] * 2, rules, len(q), 0.25, True, shares=shares)
    found, expected = shares.given(slots, q), torch.zeros(2, len(q))
    for row, own in enumerate(entries(args)):
        for entry in range(own.start, own.stop):
            one = args | {"weight": torch.zeros_like(args["weight"]).index_fill(0, torch.tensor(entry), 1)}
            one["q"] = q
            if visible(args)[row].any():
                expected[:, entry] = exact(one)[row, slots[:, row]].float()
    torch.testing.assert_close(found, expected)


def test_shares_do_not_depend_on_the_neighbours():
    args = given(((5, 9, 33), 1, 2, 37, 2, 2, 16), True)
    alone = {name: x[1:2] if name.startswith(("query", "key", "k_")) else x for name, x in args.items()}

    def mass(q, k_buf, lse, weight, query_starts, query_lengths, key_ranges):
        shares, rules = Shares(), Rules(query_lengths, key_ranges, query_starts=query_starts)
        k_buf = Stored(k_buf)
        ATTENTION(q, k_buf, k_buf, rules, len(q), 0.25, True, shares=shares)
        return MASS(q, k_buf, lse, weight, query_starts, query_lengths, key_ranges, len(q), 0.25, shares=shares)

    with use_backend("torch"):
        assert torch.equal(mass(**alone)[0], mass(**args)[1])


def test_weights_of_one_give_the_column_sums_of_the_attention(backend):
    """The values are unit vectors, so that the attention gives its own weights."""
    args, slots = given(((6, 2), 0, 0, 11, 4, 2, 11)), 11
    args["weight"] = torch.ones_like(args["weight"])
    unit = torch.eye(slots).view(1, slots, 1, slots).expand(2, -1, 2, -1)
    out = cached_attention(
        args["q"], args["k_buf"], unit, query_starts=args["query_starts"], query_lengths=args["query_lengths"]
    )
    columns = torch.stack([out[own].mean(1).sum(0) for own in entries(args)])
    torch.testing.assert_close(attention_mass(**args), columns)


def test_a_query_that_saw_nothing_gives_nothing(backend):
    args = given(SHAPES[1])
    args["lse"][entries(args)[2]][3] = -INF
    check(args)
    args["lse"][entries(args)[2]] = -INF
    assert (check(args)[2] == 0).all()


# Queries by slots of a tile, and how many programs the queries are divided among.
LAUNCHES = [((16, 16), 1), ((16, 16), 4), ((32, 16), 2), ((16, 64), 8)]


@pytest.mark.parametrize(("shape", "how"), sweep(SHAPES, LAUNCHES, quick=4))
def test_tiles_and_parts(shape, how, interpreted):
    """Rows one after the other and in reverse, and scratch that is NaN at first."""
    from dkv.kernels.common.launch import Launch

    work = Workspace()
    call = partial(interpreted.attention_mass, launch=Launch(how[0], 4), parts=how[1], workspace=work)
    for order in (None, range(len(shape[0]))[::-1]):
        args = given(shape, True, order=order)
        check(args, call, most_queries=max(shape[0]))
        for memory in work.memory():
            memory.fill_(NAN)
        check(args, call)


@pytest.mark.parametrize(
    ("queries", "heads", "slots", "programs"),
    [
        (64, (32, 32), 640, 10 * 16),  # two programs to a multiprocessor
        (64, (28, 4), 640, 10 * 16),
        (4, (28, 4), 640, 10 * 4),  # a part for each key head
        (640, (32, 32), 16384, 256),  # no need to divide
    ],
)
def test_a_small_grid_fills_the_device(queries, heads, slots, programs):
    from dkv.kernels.common.launch import Chip, trial
    from dkv.kernels.dev.cases import meta

    def longs(*size: int) -> Tensor:
        return meta(*size, dtype=torch.int64)

    q, k, lse, weight = (
        meta(queries, heads[0], 128),
        meta(1, slots, heads[1], 128),
        meta(queries, heads[0], dtype="fp32"),
        meta(queries, dtype="fp32"),
    )
    with use_backend("triton"), trial(chip=Chip("sm_90", 132)) as tried:
        attention_mass(q, k, lse, weight, query_starts=longs(1), query_lengths=longs(1), key_ranges=longs(1, 2))
    first, *total = tried.calls
    assert math.prod(first.grid) == programs and len(total) == (first.grid[1] > 1)


def test_what_is_not_a_number_shows_where_it_is_seen(backend):
    args = given(SHAPES[1], True)
    args["key_ranges"] = torch.tensor([[0, 9], [0, 21], [3, 21], [0, 0]])
    args["k_buf"] = numbers(*args["k_buf"].shape)
    clean = attention_mass(**args)
    args["q"][args["query_starts"][2] + 1, 0, 3] = NAN
    found = attention_mass(**args)
    assert found[2, 3:].isnan().all() and (found[2, :3] == 0).all()
    for row in (0, 1, 3):
        assert torch.equal(found[row], clean[row])
