"""Keys and values in 8 bits: how far off they are, where they are written, and what attention makes of them."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dkv import kernels
from dkv.kernels import Stored, attention_mass, cached_attention, rope_scatter_, rounded, use_backend
from dkv.kernels.common.backend import chosen
from tests.kernels.sweeps import sweep

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# The queries of the rows, slots, Hq and Hkv heads, D head size
SHAPES = [
    ((5,), 9, 2, 2, 16),
    ((0, 1, 7), 21, 4, 2, 24),
    ((4, 4, 4), 33, 7, 1, 48),
    ((1, 18), 150, 6, 3, 32),
    ((40, 3), 70, 8, 2, 128),
]
RULES = [(), ("key_ranges",), ("key_ranges", "key_gaps"), ("query_ends",), ("key_ranges", "query_ends"), ("key_mask",)]


def steps(x: Stored) -> Tensor:
    """Half a scale for every number, float64."""
    return (x.scales.double() / 2).unsqueeze(-1).expand(x.shape)


@given(st.integers(1, 130), st.sampled_from(DTYPES), st.floats(-30, 30), st.integers(0, 2**31))
def test_a_number_is_off_by_half_a_scale_at_most(size, dtype, power, seed):
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x = x.to(dtype)
    x = x.where(x.isfinite(), 0)
    found = rounded(x)
    assert found.numbers.dtype == torch.int8 and found.scales.dtype == torch.bfloat16
    assert found.numbers.abs().max() <= 127
    exact, top = x.double(), x.double().abs().amax(-1)
    # Of a float32 quotient there is one rounding more.
    error = (found.numbers.double() * found.scales.double().unsqueeze(-1) - exact).abs()
    assert (error <= steps(found) * (1 + 1e-4)).all()
    wanted = (top / 127).clamp(min=1e-30)
    assert ((found.scales.double() - wanted).abs() <= wanted / 256 * (1 + 1e-6)).all()


def test_what_is_not_finite_is_not_finite_after_it():
    x = torch.randn(2, 4, 16)
    x[0, 1, 3], x[1, 0, 0], x[1, 2, 5] = NAN, INF, -INF
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 1] = bad[1, 0] = bad[1, 2] = True
    found = rounded(x).plain(torch.float32)
    assert torch.equal(~found.isfinite().all(-1), bad)
    assert torch.equal(rounded(torch.zeros(1, 2, 8)).plain(torch.float64), torch.zeros(1, 2, 8).double())


def test_scales_for_which_the_largest_number_nearly_is_128():
    """Scales of bfloat16 that were rounded down by half of the distance between two of them."""
    x = torch.zeros(2048, 1, 2)
    x[:, 0, 0] = 127 * (1 + torch.arange(2048) / 2048)
    assert rounded(x).numbers.max() == 127


def buffers(b: int, s: int, hkv: int, d: int) -> tuple[Stored, Stored]:
    return rounded(torch.randn(b, s, hkv, d) * 3), rounded(torch.randn(b, s, hkv, d))


def copied(x: Stored) -> Stored:
    return Stored(*(part.clone() for part in x))


def entries_of(dtype: torch.dtype, b: int, n: int, s: int, hq: int, hkv: int, d: int) -> dict:
    angle = torch.randn(s, d // 2)
    return {
        "q": torch.randn(b, n, hq, d).to(dtype),
        "k": (torch.randn(b, n, hkv, d) * 4).to(dtype),
        "v": torch.randn(b, n, hkv, d).to(dtype),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "positions": torch.stack([torch.randperm(s)[:n] for _ in range(b)]),
    }


@pytest.mark.parametrize(("d", "dtype", "packed"), sweep((16, 24, 80, 128), DTYPES, (False, True), quick=5))
def test_entries_are_written_rounded_and_whole(backend, d, dtype, packed):
    b, n, s, hq, hkv = 2, 5, 11, 4, 2
    args, other = entries_of(dtype, b, n, s, hq, hkv, d), entries_of(dtype, b, n, s, hq, hkv, d)
    if packed:
        rows = torch.arange(b).repeat_interleave(n)
        for one in (args, other):
            one |= {name: one[name].flatten(0, 1) for name in ("q", "k", "v", "positions")} | {"rows": rows}
    other["positions"] = args["positions"]
    norm = (torch.randn(d).to(dtype), 1e-5)
    exact = torch.zeros(b, s, hkv, d).to(dtype), torch.zeros(b, s, hkv, d).to(dtype)
    expected = rope_scatter_(**args, k_buf=exact[0], v_buf=exact[1], k_norm=norm)
    before = buffers(b, s, hkv, d)
    mine, again = tuple(map(copied, before)), tuple(map(copied, before))
    query = rope_scatter_(**args, k_buf=mine[0], v_buf=mine[1], k_norm=norm)
    assert torch.equal(query, expected)
    here = torch.zeros(b, s, dtype=torch.bool)
    here[torch.arange(b)[:, None], args["positions"].view(b, n)] = True
    # The interpreter has float32 in place of bfloat16, and rounds what it writes to a buffer afterwards.
    slack = 2**-7 if dtype == torch.bfloat16 and chosen() == "triton" else 0
    for found, old, plain in zip(mine, before, exact, strict=True):
        error = (found.plain(torch.float64) - plain.double()).abs()
        top = plain.double().abs().amax(-1, keepdim=True)
        assert (error[here] <= (steps(found) * (1 + 1e-4) + slack * top)[here]).all()
        assert all(torch.equal(x[~here], y[~here]) for x, y in zip(found, old, strict=True))
    # What stood there before leaves nothing behind.
    for given_ in (other, args):
        rope_scatter_(**given_, k_buf=again[0], v_buf=again[1], k_norm=norm)
    for one, two in zip(mine, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_what_is_not_finite_is_told_from_what_was_written(backend):
    args = entries_of(torch.float32, 1, 4, 9, 2, 2, 16)
    args["k"][0, 1, 0, 3], args["v"][0, 2, 1, 15] = NAN, INF
    keys, values = buffers(1, 9, 2, 16)
    rope_scatter_(**args, k_buf=keys, v_buf=values)
    for found, place, head in ((keys, 1, 0), (values, 2, 1)):
        bad = torch.zeros(1, 9, 2, dtype=torch.bool)
        bad[0, args["positions"][0, place], head] = True
        assert torch.equal(~found.plain(torch.float32).isfinite().all(-1), bad)


def attention_of(shape, names, dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Packed queries, keys and values, and rules."""
    lengths, slots, hq, hkv, d = shape
    draw, batch, total = random.Random(seed), len(lengths), sum(lengths)
    rules = {
        "query_lengths": torch.tensor(lengths),
        "query_starts": torch.tensor([sum(lengths[:row]) for row in range(batch)]),
        "most_queries": max(lengths),
    }
    cut = [sorted((draw.randrange(slots + 1), draw.randrange(slots + 1))) for _ in range(2 * batch)]
    if "key_ranges" in names:
        rules["key_ranges"] = torch.tensor(cut[:batch])
    if "key_gaps" in names:
        rules["key_gaps"] = torch.tensor(cut[batch:])
    if "query_ends" in names:
        rules["query_ends"] = torch.tensor([draw.randrange(slots + 1) for _ in range(total)], dtype=torch.int64)
    if "key_mask" in names:
        rules["key_mask"] = torch.rand(batch, slots) < 0.6
    q = torch.randn(total, hq, d).to(dtype)
    return q, torch.randn(batch, slots, hkv, d), torch.randn(batch, slots, hkv, d), rules


def exactly(q: Tensor, keys: Tensor, values: Tensor, rules: dict) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        return cached_attention(q.double(), keys.double(), values.double(), return_lse=True, **rules)


@pytest.mark.parametrize(("shape", "names", "dtype"), sweep(SHAPES, RULES, DTYPES, quick=7))
def test_attention_is_that_over_what_the_buffer_stands_for(backend, assert_close, shape, names, dtype):
    q, keys, values, rules = attention_of(shape, names, dtype)
    held = rounded(keys), rounded(values)
    exact, exact_lse = exactly(q, *(x.plain(torch.float64) for x in held), rules)
    out, lse = cached_attention(q, *held, return_lse=True, **rules)
    assert out.dtype == dtype
    # By as much as where the buffer is in the dtype of the queries.
    rounding = 0.02 if dtype == torch.bfloat16 else 0.003 if dtype == torch.float16 else 2e-5
    torch.testing.assert_close(out.double(), exact, atol=rounding, rtol=rounding)
    torch.testing.assert_close(lse.double(), exact_lse, atol=rounding, rtol=rounding)


@pytest.mark.parametrize(("shape", "names"), sweep(SHAPES, RULES[:5], quick=3))
def test_attention_is_off_by_no_more_than_the_steps_of_its_buffer(backend, shape, names):
    """Scores move by e = scale * sum |q| * half a scale of a key at most. So weights change by factors from exp(-2e) to
    exp(2e), all of them together by exp(2e) - 1 at most, and values move by half of their scales."""
    q, keys, values, rules = attention_of(shape, names, torch.float32)
    held = rounded(keys), rounded(values)
    exact, exact_lse = exactly(q, keys, values, rules)
    out, lse = cached_attention(q, *held, return_lse=True, **rules)
    lengths, _, hq, hkv, d = shape
    for row, (start, length) in enumerate(zip(rules["query_starts"].tolist(), lengths, strict=True)):
        own, group = slice(start, start + length), hq // hkv
        half_key, half_value = (x.scales[row].double().amax(0).repeat_interleave(group) / 2 for x in held)  # [Hq]
        moved = q[own].double().abs().sum(-1) * half_key * d**-0.5
        largest = values[row].double().abs().amax((0, 2)).repeat_interleave(group)
        bound = (moved * 2).expm1() * largest + half_value
        off = (out[own].double() - exact[own]).abs().amax(-1)
        assert (off <= bound + 1e-5).all()
        seen = exact_lse[own] > -INF
        assert ((lse[own].double() - exact_lse[own]).abs()[seen] <= (moved + 1e-5)[seen]).all()


def test_a_single_slot_is_off_by_nearly_as_much_as_it_may_be(backend):
    """So half a scale is no bound that anything would keep."""
    q, values = torch.randn(1, 4, 2, 128), torch.randn(1, 1, 2, 128)
    held = rounded(values)
    out = cached_attention(q, rounded(torch.randn(1, 1, 2, 128)), held)
    off = (out.double() - values.double()).abs() / steps(held)
    assert 0.97 < off.max() <= 1 + 1e-4


@pytest.mark.parametrize("names", [("key_ranges",), ("key_ranges", "key_gaps"), ("query_ends",), ("key_mask",)])
def test_hidden_slots_may_hold_anything_and_seen_ones_are_told(backend, names):
    q, keys, values, rules = attention_of(((5, 7), 150, 4, 2, 32), names, torch.float32, seed=3)
    held = rounded(keys), rounded(values)
    expected = cached_attention(q, *held, **rules)
    slot, owner = torch.arange(150), torch.arange(2).repeat_interleave(torch.tensor([5, 7]))
    seen = torch.ones(12, 150, dtype=torch.bool)
    if "key_ranges" in names:
        seen &= (slot >= rules["key_ranges"][owner, :1]) & (slot < rules["key_ranges"][owner, 1:])
    if "key_gaps" in names:
        seen &= (slot < rules["key_gaps"][owner, :1]) | (slot >= rules["key_gaps"][owner, 1:])
    if "query_ends" in names:
        seen &= slot < rules["query_ends"][:, None]
    if "key_mask" in names:
        seen &= rules["key_mask"][owner]
    # Of slots that no query of the row sees, and of those that some see, one by one.
    nobody = ~torch.stack([seen[owner == row].any(0) for row in range(2)])
    for scales in (held[0].scales, held[1].scales):
        scales[nobody] = NAN
    found = cached_attention(q, *held, **rules)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    place = int(seen[:5].sum(0).argmax())
    for which in (0, 1):
        poisoned = tuple(map(copied, held))
        poisoned[which].scales[0, place, 1] = NAN
        found = cached_attention(q, *poisoned, **rules)
        bad = torch.zeros(12, 4, dtype=torch.bool)
        bad[:5, 2:] = seen[:5, place, None]
        assert torch.equal(found.isnan().all(-1), bad)
        torch.testing.assert_close(found[~bad], expected[~bad], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("shape", "ranged", "dtype"), sweep(SHAPES, (False, True), DTYPES, quick=5))
def test_mass_is_that_of_what_the_keys_stand_for(backend, shape, ranged, dtype):
    q, keys, values, rules = attention_of(shape, ("key_ranges",) if ranged else (), dtype)
    held = rounded(keys)
    _, lse = exactly(q, held.plain(torch.float64), values, rules)
    weight = torch.rand(len(q))
    with use_backend("reference"):
        exact = attention_mass(q.double(), held.plain(torch.float64), lse, weight.double(), **rules)
    summed = torch.promote_types(dtype, torch.float32)
    found = attention_mass(q, held, lse.to(summed), weight.to(summed), **rules)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found.double(), exact, atol=rounding, rtol=rounding)


def test_large_values_in_float16_do_not_overflow_and_small_weights_do_not_vanish(backend):
    """A thousand slots that share the weight, and a value of 40,000."""
    q, keys = torch.zeros(1, 2, 2, 16).half(), torch.randn(1, 1000, 2, 16)
    values = torch.randn(1, 1000, 2, 16) * 1e-3
    values[0, :, 1] = 40000
    out = cached_attention(q, rounded(keys), rounded(values))
    exact = values.double().mean(1, keepdim=True).expand(1, 2, 2, 16)
    torch.testing.assert_close(out[:, :, 0].double(), exact[:, :, 0], atol=2e-6, rtol=0.05)
    torch.testing.assert_close(out[:, :, 1].double(), exact[:, :, 1], atol=0, rtol=0.01)


def test_strides_of_any_kind(backend):
    q, keys, values, rules = attention_of(((5, 7), 40, 4, 2, 32), ("key_ranges",), torch.float32)
    held = rounded(keys), rounded(values)
    expected = cached_attention(q, *held, **rules)
    wider = [rounded(torch.randn(3, 44, 3, 40)) for _ in held]
    inner = [
        Stored(
            x.numbers[1:, 2:42, 1:, 4:36].copy_(own.numbers),
            x.scales.transpose(0, 1).contiguous().transpose(0, 1)[1:, 2:42, 1:].copy_(own.scales),
        )
        for x, own in zip(wider, held, strict=True)
    ]
    torch.testing.assert_close(cached_attention(q, *inner, **rules), expected, atol=1e-6, rtol=1e-5)


def test_arguments_that_do_not_fit():
    q, keys, values, _ = attention_of(((3,), 9, 2, 2, 16), (), torch.float32)
    q, held = q.unsqueeze(0), (rounded(keys), rounded(values))
    whole, scales = held[0]
    for pair, why in (
        ((whole, whole), "k_buf must be float16, bfloat16, float32, float64, got int8"),
        ((held[0], values), "v_buf is torch.float32 but k_buf is torch.int8"),
        ((Stored(whole, scales.float()), held[1]), "the scales of k_buf must be bfloat16, got float32"),
        ((Stored(keys, scales), held[1]), "k_buf must be int8, got float32"),
        ((held[0], Stored(whole, scales[:, :, :1])), r"the scales of v_buf must have shape \[1, 9, 2\]"),
    ):
        with pytest.raises(ValueError, match=why):
            cached_attention(q, *pair)
    args = entries_of(torch.float32, 1, 3, 9, 2, 2, 16)
    with pytest.raises(ValueError, match=r"the scales of k_buf must have shape \[1, 9, 2\]"):
        rope_scatter_(**args, k_buf=Stored(whole, scales[:, :3]), v_buf=held[1])
    with pytest.raises(ValueError, match="k_buf must be float16"):
        one = torch.tensor([0])
        attention_mass(q[0], whole, torch.zeros(3, 2), torch.ones(3), query_starts=one, query_lengths=one + 3)


def test_names_are_public():
    assert {"Stored", "rounded"} <= set(kernels.__all__)
