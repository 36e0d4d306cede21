"""rope_scatter_ and rotate."""

import pytest
import torch
from torch import Tensor

from dkv.kernels import rope_scatter_, rotate, use_backend
from tests.kernels.sweeps import sweep

# B rows, N active slots, S slots, Hq and Hkv heads, D head size
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 5, 11, 4, 2, 80),
    (3, 4, 9, 7, 1, 96),
    (2, 7, 7, 3, 3, 64),
    (1, 3, 17, 8, 2, 112),
    (2, 3, 6, 14, 2, 128),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = ["query_positions", "q_norm", "k_norm"]


def shape_id(shape: tuple[int, ...]) -> str:
    return "B{}-N{}-S{}-H{}/{}-D{}".format(*shape)


def inputs(shape: tuple[int, ...], dtype=torch.float32, table=torch.float32, buffer=None) -> dict[str, Tensor]:
    b, n, s, hq, hkv, d = shape
    angle = torch.arange(s + 3)[:, None] * 100.0 ** -torch.linspace(0, 1, d // 2)
    sizes = {"q": (b, n, hq, d), "k": (b, n, hkv, d), "v": (b, n, hkv, d)}
    return {
        **{name: torch.randn(size).to(dtype) for name, size in sizes.items()},
        "cos": angle.cos().to(table),
        "sin": angle.sin().to(table),
        "positions": torch.stack([torch.randperm(s)[:n] for _ in range(b)]),
        "k_buf": torch.randn(b, s, hkv, d).to(buffer or dtype),
        "v_buf": torch.randn(b, s, hkv, d).to(buffer or dtype),
    }


def options(shape: tuple[int, ...], names: list[str], dtype=torch.float32) -> dict:
    b, n, s, *_, d = shape
    every = {
        "query_positions": torch.randint(0, s + 3, (b, n)),
        "q_norm": (torch.randn(d).to(dtype), 1e-5),
        "k_norm": (torch.randn(d).to(dtype), 1e-6),
    }
    return {name: every[name] for name in names}


def plain(q, k, v, cos, sin, positions, k_buf, v_buf, query_positions=None, q_norm=None, k_norm=None):
    """The rotated queries and both buffers, one entry at a time, at the dtypes given."""
    b, n = positions.shape
    k_buf, v_buf, out = k_buf.clone(), v_buf.clone(), torch.empty_like(q)
    query_positions = positions if query_positions is None else query_positions

    def turn(x: Tensor, norm: tuple[Tensor, float] | None, place: Tensor) -> Tensor:
        if norm is not None:
            gain, eps = norm
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain
        c, s = cos[place], sin[place]
        first, second, rest = x[:, : len(c)], x[:, len(c) : 2 * len(c)], x[:, 2 * len(c) :]
        return torch.cat((first * c - second * s, first * s + second * c, rest), -1)

    for row in range(b):
        for i in range(n):
            k_buf[row, positions[row, i]] = turn(k[row, i], k_norm, positions[row, i]).to(k.dtype).to(k_buf.dtype)
            v_buf[row, positions[row, i]] = v[row, i].to(v_buf.dtype)
        for i in range(q.shape[1]):
            out[row, i] = turn(q[row, i], q_norm, query_positions[row, i]).to(q.dtype)
    return out, k_buf, v_buf


def cast(args: dict, dtype: torch.dtype) -> dict:
    def one(x):
        if isinstance(x, tuple):
            return (x[0].to(dtype), x[1])
        return x.to(dtype) if x.is_floating_point() else x

    return {name: one(x) for name, x in args.items()}


def compare(assert_close, args: dict, extra: dict) -> None:
    """The result and the buffers against the loop in float64."""
    exact = plain(**cast(args, torch.float64), **cast(extra, torch.float64))
    double = args["q"].dtype == torch.float64
    rough = plain(**cast(args, torch.float32), **cast(extra, torch.float32)) if double else plain(**args, **extra)
    out = rope_scatter_(**args, **extra)
    assert out.dtype == args["q"].dtype
    assert_close(out, exact[0], rough[0])
    assert_close(args["k_buf"], exact[1], rough[1])
    assert_close(args["v_buf"], exact[2], rough[2])
    if not double:
        assert torch.equal(args["v_buf"], rough[2])


@pytest.mark.parametrize(("shape", "dtype", "table"), sweep(SHAPES, DTYPES, (torch.float32, None), quick=2))
def test_dtypes(shape, dtype, table, backend, assert_close):
    compare(assert_close, inputs(shape, dtype, table or dtype), {})


@pytest.mark.parametrize(
    ("shape", "names", "dtype"), sweep(SHAPES, [*([name] for name in OPTIONS), OPTIONS], DTYPES, quick=4)
)
def test_options(shape, names, dtype, backend, assert_close):
    compare(assert_close, inputs(shape, dtype), options(shape, names, dtype))


@pytest.mark.parametrize(("shape", "width", "names", "dtype"), sweep(SHAPES, [1, 4, 7], [[], OPTIONS], DTYPES, quick=5))
def test_a_part_of_a_head(shape, width, names, dtype, backend, assert_close):
    args = inputs(shape, dtype)
    args |= {name: args[name][:, :width].contiguous() for name in ("cos", "sin")}
    compare(assert_close, args, options(shape, names, dtype))


def test_what_is_not_rotated_keeps_its_bits(backend):
    args = inputs(SHAPES[1])
    args |= {name: args[name][:, :8].contiguous() for name in ("cos", "sin")}
    args["q"][..., 17] = torch.inf
    found, place = rope_scatter_(**args), args["positions"]
    assert torch.equal(found[..., 16:], args["q"][..., 16:]) and found[..., :16].isfinite().all()
    assert torch.equal(args["k_buf"][torch.arange(2)[:, None], place][..., 16:], args["k"][..., 16:])


@pytest.mark.parametrize(("dtype", "buffer"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_buffer_of_another_dtype(dtype, buffer, backend, assert_close):
    args = inputs(SHAPES[1], dtype, buffer=buffer)
    compare(assert_close, args, options(SHAPES[1], ["q_norm"]))
    assert args["k_buf"].dtype == args["v_buf"].dtype == buffer


def test_gain_of_another_dtype_leaves_the_dtype_of_q(backend):
    args = inputs(SHAPES[1], torch.bfloat16)
    assert rope_scatter_(**args, **options(SHAPES[1], ["q_norm", "k_norm"])).dtype == torch.bfloat16


def test_fewer_queries_than_keys(backend):
    shape = SHAPES[1]
    args = inputs(shape)
    expected = rope_scatter_(**args)
    args["q"] = args["q"][:, [3, 1]]
    assert torch.equal(rope_scatter_(**args, query_positions=args["positions"][:, [3, 1]]), expected[:, [3, 1]])


def test_strides(restride, backend):
    args = inputs(SHAPES[1])
    strided = {name: restride(x) if x.is_floating_point() else x for name, x in args.items()}
    strided["positions"] = torch.stack([args["positions"]] * 2, -1)[..., 0]
    torch.testing.assert_close(rope_scatter_(**strided), rope_scatter_(**args))
    for name in args:  # the buffers are written, the others are as they were
        torch.testing.assert_close(strided[name], args[name])


def test_positions_that_are_columns_of_wider_ones(backend):
    args, extra = inputs(SHAPES[1]), options(SHAPES[1], OPTIONS[:1])
    wider = {
        name: torch.cat([x, x + 1000], 1)[:, : x.shape[1]] for name, x in (args | extra).items() if "posit" in name
    }
    assert set(wider) == {"positions", "query_positions"} and not any(x.is_contiguous() for x in wider.values())
    torch.testing.assert_close(rope_scatter_(**args | wider), rope_scatter_(**args, **extra))


def test_nothing_around_a_slice_of_a_buffer_is_written(backend):
    args = inputs(SHAPES[1])
    for name in ("k_buf", "v_buf"):
        whole = torch.full([size + 2 for size in args[name].shape], torch.nan)
        args[name] = whole[1:-1, 1:-1, 1:-1, 1:-1].copy_(args[name])
        rope_scatter_(**args)
        assert (~whole.isnan()).sum() == args[name].numel()


def test_rotation_is_a_product_of_complex_numbers():
    args = inputs(SHAPES[1], torch.float64, torch.float64)
    q, turn = args["q"], torch.complex(args["cos"], args["sin"])[args["positions"]].unsqueeze(2)
    product = torch.complex(q[..., :40], q[..., 40:]) * turn
    expected = torch.cat((product.real, product.imag), -1)
    cos, sin = (args[name][args["positions"]] for name in ("cos", "sin"))
    torch.testing.assert_close(rotate(q, cos, sin), expected)


@pytest.mark.parametrize("names", [[], OPTIONS], ids=["plain", "all"])
def test_nothing_is_read_back(names, no_readback):
    args, extra = inputs(SHAPES[1]), options(SHAPES[1], names)
    with use_backend("torch"), no_readback():
        rope_scatter_(**args, **extra, validate=False)


ODD = (2, 5, 11, 3, 2, 24)


@pytest.mark.parametrize(("entries", "names"), sweep((1, 2, 8, 64), ([], OPTIONS), quick=2))
def test_any_tile_gives_the_same_bits(entries, names, interpreted):
    from dkv.kernels.common.launch import Launch

    args, extra = inputs(ODD), options(ODD, names)
    other = {name: x.clone() for name, x in args.items()}
    expected = interpreted.rope_scatter_(**args, **extra)
    launch = Launch((entries,), 1)
    assert torch.equal(interpreted.rope_scatter_(**other, **extra, launch=launch), expected)
    for name in ("k_buf", "v_buf"):
        assert torch.equal(other[name], args[name])


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("r", [1, 4, 7])
def test_around_one_tile(n, r, interpreted, assert_close):
    """As many heads as a tile has, one fewer and one more, of the queries and of the keys."""
    from dkv.kernels.common.launch import Launch

    args = inputs((2, n, 9, 1, 1, 16))
    args["q"], place = torch.randn(2, r, 1, 16), torch.randint(9, (2, r))
    k_buf, v_buf = args["k_buf"].clone(), args["v_buf"].clone()
    launch = Launch((4,), 1)
    out = interpreted.rope_scatter_(**args, query_positions=place, launch=launch)
    before = args | {"k_buf": k_buf, "v_buf": v_buf}
    exact = plain(**cast(before, torch.float64), query_positions=place)
    rough = plain(**before, query_positions=place)
    for found, *expected in zip((out, args["k_buf"], args["v_buf"]), exact, rough, strict=True):
        assert_close(found, *expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [[], OPTIONS], ids=["plain", "all"])
def test_a_row_alone_and_in_company_gives_the_same_bits(dtype, names, backend):
    shape = (8, 3, 7, 4, 2, 16)
    args, extra = inputs(shape, dtype), options(shape, names, dtype)
    per_row = [name for name in (*args, "query_positions") if name not in ("cos", "sin")]
    alone = [
        {name: x[i : i + 1].clone() if name in per_row else x for name, x in (args | extra).items()} for i in range(8)
    ]
    out = rope_scatter_(**args, **extra)
    for i, own in enumerate(alone):
        found = rope_scatter_(**own)
        assert torch.equal(found[0], out[i])
        for name in ("k_buf", "v_buf"):
            assert torch.equal(own[name][0], args[name][i])


def test_only_the_named_slots_are_written(backend):
    """Buffers of NaN, also around the slices that are given."""
    args, extra = inputs(SHAPES[1]), options(SHAPES[1], OPTIONS)
    for name in ("k_buf", "v_buf"):
        whole = torch.full([size + 2 for size in args[name].shape], torch.nan)
        args[name] = whole[1:-1, 1:-1, 1:-1, 1:-1]
        rope_scatter_(**args, **extra)
        written = torch.zeros(args[name].shape[:2], dtype=torch.bool)
        written.scatter_(1, args["positions"], True)
        assert torch.equal(args[name].isfinite().all((2, 3)), written)
        assert whole.isfinite().sum() == written.sum() * args[name][0, 0].numel()


def test_no_queries_or_no_keys(backend):
    args = inputs(SHAPES[1])
    none = {name: args[name][:, :0] for name in ("k", "v", "positions")}
    before, expected = args["k_buf"].clone(), plain(**args)
    found = rope_scatter_(**args | none, query_positions=args["positions"])
    torch.testing.assert_close(found, expected[0])
    assert torch.equal(args["k_buf"], before)
    assert rope_scatter_(**args | {"q": args["q"][:, :0]}, query_positions=args["positions"][:, :0]).numel() == 0
    torch.testing.assert_close(args["k_buf"], expected[1])


# Public reports


def test_A11_whole_numbers_in_bfloat16(backend):
    """Quarter turns of small whole numbers: right to the last bit in any dtype."""
    args = inputs((2, 5, 9, 4, 2, 16), torch.bfloat16, torch.bfloat16)
    quarter = torch.arange(12)[:, None] + torch.arange(8)
    args["cos"], args["sin"] = (
        torch.tensor(values, dtype=torch.bfloat16)[quarter % 4] for values in ([1, 0, -1, 0], [0, 1, 0, -1])
    )
    for name in ("q", "k", "v"):
        args[name] = torch.randint(-2, 3, args[name].shape).bfloat16()
    exact = plain(**cast(args, torch.float64))
    found = rope_scatter_(**args), args["k_buf"], args["v_buf"]
    for x, expected in zip(found, exact, strict=True):
        assert torch.equal(x.double(), expected)


def test_A10_int32_and_int64_give_the_same(backend):
    args, extra = inputs(SHAPES[1]), options(SHAPES[1], OPTIONS)
    narrow = {name: x.clone().int() if name == "positions" else x.clone() for name, x in args.items()}
    short = {name: x.int() if name in OPTIONS[:1] else x for name, x in extra.items()}
    assert torch.equal(rope_scatter_(**narrow, **short), rope_scatter_(**args, **extra))
    assert torch.equal(narrow["k_buf"], args["k_buf"])
