"""cached_attention."""

import pytest
import torch
from torch import Tensor

from dkv.kernels import cached_attention, use_backend
from dkv.kernels.common.backend import chosen
from tests.kernels.sweeps import sweep

# B rows, N queries, S slots, Hq and Hkv heads, D head size
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 5, 37, 4, 2, 80),
    (3, 7, 33, 7, 1, 96),
    (2, 33, 65, 4, 4, 64),
    (1, 3, 17, 8, 2, 112),
    (2, 4, 31, 14, 2, 128),
    (1, 6, 9, 4, 1, 32),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
RULES = ["query_lengths", "key_ranges", "key_gaps", "key_mask", "mask", "block_ids"]


def shape_id(shape: tuple[int, ...]) -> str:
    return "B{}-N{}-S{}-H{}/{}-D{}".format(*shape)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, n, s, hq, hkv, d = shape
    return tuple(torch.randn(size).to(dtype) for size in ((b, n, hq, d), (b, s, hkv, d), (b, s, hkv, d)))


def rules(shape: tuple[int, ...], names: list[str], integer: torch.dtype = torch.int64) -> dict:
    """Random visibility; the last row of the batch is hidden by each rule that can hide a row."""
    b, n, s, *_ = shape
    ends = torch.randint(1, s + 1, (b,))
    every = {
        "query_lengths": torch.randint(1, n + 1, (b,), dtype=integer),
        "key_ranges": torch.stack([torch.randint(0, s, (b,)).minimum(ends), ends], 1).to(integer),
        "key_gaps": torch.randint(0, s + 1, (b, 2)).sort(1).values.to(integer),
        "key_mask": torch.rand(b, s) < 0.6,
        "mask": torch.rand(b, n, s) < 0.6,
        "block_ids": (torch.randint(0, 4, (b, n), dtype=integer), torch.randint(0, 5, (b, s), dtype=integer)),
    }
    if b > 1:
        every["query_lengths"][-1] = 0
        every["key_ranges"][-1] = torch.tensor([s // 2, s // 2])
        every["key_gaps"][-1] = torch.tensor([0, s])
        every["key_mask"][-1] = False
    return {name: every[name] for name in names}


def seen(shape, query_lengths=None, key_ranges=None, key_gaps=None, key_mask=None, mask=None, block_ids=None) -> Tensor:
    """Bool [B, N, S] by the words of the docstring, one pair at a time."""
    b, n, s, *_ = shape
    lengths = [n] * b if query_lengths is None else query_lengths.tolist()
    ranges = [(0, s)] * b if key_ranges is None else key_ranges.tolist()
    gaps = [(0, 0)] * b if key_gaps is None else key_gaps.tolist()
    key_mask = [[True] * s] * b if key_mask is None else key_mask.tolist()
    mask = [[[True] * s] * n] * b if mask is None else mask.tolist()
    query_block, key_block = ([[0] * n] * b, [[0] * s] * b) if block_ids is None else (x.tolist() for x in block_ids)

    def sees(row: int, i: int, j: int) -> bool:
        in_range = i < lengths[row] and ranges[row][0] <= j < ranges[row][1]
        in_range = in_range and not gaps[row][0] <= j < gaps[row][1]
        return in_range and key_mask[row][j] and mask[row][i][j] and key_block[row][j] <= query_block[row][i]

    return torch.tensor([[[sees(row, i, j) for j in range(s)] for i in range(n)] for row in range(b)])


def plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, scale: float | None = None):
    """The formula, at the dtype of q: output and log-sum-exp."""
    heads = [h // (q.shape[2] // k.shape[2]) for h in range(q.shape[2])]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = q.transpose(1, 2) @ k[:, :, heads].permute(0, 2, 3, 1) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    weights = scores.softmax(-1)
    if visible is not None:
        weights = weights.masked_fill(~visible.any(-1)[:, None, :, None], 0)
    return (weights @ v[:, :, heads].transpose(1, 2)).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def compare(assert_close, q, k, v, visible, **options) -> None:
    """Output and log-sum-exp against the formula in float64."""

    def formula(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return plain(q.to(dtype), k.to(dtype), v.to(dtype), visible, options.get("scale"))

    exact, exact_lse = formula(torch.float64)
    rough, _ = formula(torch.float32 if q.dtype == torch.float64 else q.dtype)
    _, rough_lse = formula(torch.float32)
    out, lse = cached_attention(q, k, v, return_lse=True, **options)
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    assert_close(lse, exact_lse, rough_lse)
    # For a kernel the log-sum-exp is no more than another store.
    for x in (out,) if chosen() == "triton" and options else (out, cached_attention(q, k, v, **options)):
        assert x.dtype == q.dtype
        assert_close(x, exact, rough)


@pytest.mark.parametrize(("shape", "dtype"), sweep(SHAPES, DTYPES, quick=2))
def test_everything_visible(shape, dtype, backend, assert_close):
    compare(assert_close, *inputs(shape, dtype), None)


@pytest.mark.parametrize(("shape", "names"), sweep(SHAPES, [*([rule] for rule in RULES), RULES[:2], RULES], quick=2))
def test_visibility(shape, names, backend, assert_close):
    options = rules(shape, names)
    compare(assert_close, *inputs(shape), seen(shape, **options), **options)


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_visibility_in_other_dtypes(shape, dtype, backend, assert_close):
    options = rules(shape, RULES)
    compare(assert_close, *inputs(shape, dtype), seen(shape, **options), **options)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, -0.7, 1e-42])
@pytest.mark.parametrize("names", [[], RULES], ids=["plain", "all-rules"])
def test_scale(scale, names, backend, assert_close):
    options = rules(SHAPES[1], names)
    visible = seen(SHAPES[1], **options) if names else None
    compare(assert_close, *inputs(SHAPES[1]), visible, scale=scale, **options)


def test_inputs_are_left_alone(backend):
    q, k, v = inputs(SHAPES[1])
    before = [x.clone() for x in (q, k, v)]
    cached_attention(q, k, v, **rules(SHAPES[1], RULES))
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_order_of_slots_does_not_matter(backend):
    q, k, v = (x.double() for x in inputs(SHAPES[1]))
    order = torch.randperm(k.shape[1])
    torch.testing.assert_close(cached_attention(q, k[:, order], v[:, order]), cached_attention(q, k, v))


@pytest.mark.parametrize("names", [[], RULES], ids=["plain", "all-rules"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=shape_id)
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out+lse"])
def test_nothing_is_read_back(names, shape, return_lse, no_readback):
    args, options = inputs(shape), rules(shape, names)
    with use_backend("torch"), no_readback():
        cached_attention(*args, return_lse=return_lse, **options)


# Public reports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_A01_query_that_sees_nothing_is_zero(dtype, backend, assert_close):
    shape = (1, 4, 6, 2, 2, 16)
    q, k, v = inputs(shape, dtype)
    # Query 2 stands in a block before all keys.
    blocks = torch.tensor([[0, 0, -1, 0]]), torch.zeros(1, 6, dtype=torch.int64)
    out, lse = cached_attention(q, k, v, block_ids=blocks, return_lse=True)
    assert (out[0, 2] == 0).all()
    assert (lse[0, 2] == -torch.inf).all()
    compare(assert_close, q, k, v, seen(shape, block_ids=blocks), block_ids=blocks)


@pytest.mark.parametrize("first", [64, 128, 191], ids="first-visible-{}".format)
@pytest.mark.parametrize("rule", ["key_ranges", "key_mask"])
def test_A02_leading_tiles_hidden(first, rule, backend, assert_close):
    shape = (1, 3, 192, 2, 1, 64)
    q, k, v = inputs(shape)
    options = {"key_ranges": torch.tensor([[first, 192]]), "key_mask": (torch.arange(192) >= first)[None]}
    options = {rule: options[rule]}
    compare(assert_close, q, k, v, seen(shape, **options), **options)
    if first == 191:
        expected = v[:, 191:].expand(1, 3, 1, 64).repeat_interleave(2, 2)
        torch.testing.assert_close(cached_attention(q, k, v, **options), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [16, 64, 80, 96, 112, 128])
def test_A05_head_sizes(size, backend, assert_close):
    """In float32 and float64 too: the shapes of `test_everything_visible` have these sizes."""
    compare(assert_close, *inputs((2, 5, 37, 4, 2, size), torch.bfloat16), None)


@pytest.mark.parametrize("which", ["q", "k_buf", "v_buf", "all"])
def test_A07_strides(which, restride, backend):
    tensors = dict(zip(("q", "k_buf", "v_buf"), inputs((1, 5, 62, 2, 2, 128)), strict=True))
    strided = {name: restride(x) if which in (name, "all") else x for name, x in tensors.items()}
    assert not all(x.is_contiguous() for x in strided.values())
    torch.testing.assert_close(cached_attention(**strided), cached_attention(**tensors))


def test_A07_strides_of_the_rules(backend):
    args, options = inputs(SHAPES[1]), rules(SHAPES[1], RULES)
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in options.items() if name != "block_ids"}
    strided["block_ids"] = tuple(torch.stack([x, x], -1)[..., 0] for x in options["block_ids"])
    assert torch.equal(cached_attention(*args, **strided), cached_attention(*args, **options))


def test_A10_int32_and_int64_give_the_same(backend):
    args = inputs(SHAPES[1])
    torch.manual_seed(1)
    wide = rules(SHAPES[1], RULES, torch.int64)
    torch.manual_seed(1)
    narrow = rules(SHAPES[1], RULES, torch.int32)
    assert torch.equal(cached_attention(*args, **narrow), cached_attention(*args, **wide))


def test_A16_parts_merge_by_their_log_sum_exp(backend, assert_close):
    shape = (3, 5, 24, 4, 2, 32)
    q, k, v = inputs(shape)
    # Row 0 sees slots of both parts, row 1 of the second part only, row 2 none.
    mask = torch.rand(3, 24) < 0.7
    mask[1, :10] = False
    mask[2] = False

    parts = [
        cached_attention(q, k[:, part], v[:, part], key_mask=mask[:, part], return_lse=True)
        for part in (slice(0, 10), slice(10, 24))
    ]
    (first, first_lse), (second, second_lse) = parts
    assert (first[1:] == 0).all()
    assert (first_lse[1:] == -torch.inf).all()
    # The weights of the parts; the maximum of a pair of empty parts is replaced, as -inf - -inf is NaN.
    top = torch.maximum(first_lse, second_lse)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = [(lse - top).exp() for lse in (first_lse, second_lse)]
    total = sum(weights)
    merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    merged = merged / total.masked_fill(total == 0, 1)[..., None]
    merged_lse = total.log() + top

    exact, exact_lse = plain(q.double(), k.double(), v.double(), seen(shape, key_mask=mask))
    rough, rough_lse = plain(q, k, v, seen(shape, key_mask=mask))
    assert_close(merged, exact, rough)
    assert_close(merged_lse, exact_lse, rough_lse)
    assert torch.equal(merged[1], second[1])
    assert (merged[2] == 0).all()


@pytest.mark.parametrize("size", [1, 8, 257, 320])
def test_head_sizes_outside_the_tables(size, backend, assert_close):
    compare(assert_close, *inputs((1, 3, 9, 2, 1, size)), None)
