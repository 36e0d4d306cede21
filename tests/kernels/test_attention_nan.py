"""cached_attention among numbers that are not finite: hidden ones leave no trace, visible ones show."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dkv.kernels import cached_attention, use_backend
from dkv.kernels.common.backend import chosen
from tests.kernels.sweeps import sweep

NAN, INF = float("nan"), float("inf")
B, N, S, HQ, HKV, D = 2, 4, 9, 4, 2, 16
SEEN = 5  # slots from here on are hidden from row 0; row 1 sees all
RULES = ["key_ranges", "key_gaps", "key_mask", "mask", "block_ids", "all"]


def rules(name: str) -> dict:
    slot = torch.arange(S)
    seen = torch.stack([slot < SEEN, slot < S])
    every = {
        "key_ranges": torch.tensor([[0, SEEN], [0, S]]),
        "key_gaps": torch.tensor([[SEEN, S], [0, 0]]),
        "key_mask": seen,
        "mask": seen[:, None].repeat(1, N, 1),
        "block_ids": (torch.zeros(B, N, dtype=torch.int64), (~seen).long()),
    }
    return every if name == "all" else {name: every[name]}


def inputs(dtype: torch.dtype = torch.float32, hkv: int = HKV) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, N, HQ, D).to(dtype), torch.randn(B, S, hkv, D).to(dtype), torch.randn(B, S, hkv, D).to(dtype)


def both(*args, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The output alone, and the output with its log-sum-exp, which for a kernel is no more than another store."""
    out, lse = cached_attention(*args, return_lse=True, **options)
    return out if chosen() == "triton" else cached_attention(*args, **options), out, lse


@pytest.mark.parametrize(("where", "name", "bad"), sweep(("key", "value"), RULES, (NAN, INF), quick=2))
def test_what_is_hidden_leaves_no_trace(where, name, bad, backend):
    q, k, v = inputs()
    clean = both(q, k, v, **rules(name))
    (k if where == "key" else v)[0, SEEN:] = bad
    for found, expected in zip(both(q, k, v, **rules(name)), clean, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("hkv", "dtype"), sweep((1, 4), (torch.float16, torch.bfloat16, torch.float64), quick=2))
def test_in_other_dtypes_and_groups(hkv, dtype, backend):
    q, k, v = inputs(dtype, hkv)
    clean = both(q, k, v, **rules("all"))
    k[0, SEEN:], v[0, SEEN:] = NAN, NAN
    for found, expected in zip(both(q, k, v, **rules("all")), clean, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("bad", "where", "name"), sweep((NAN, INF), ("query", "key", "value"), RULES))
def test_what_is_visible_shows(bad, where, name, backend):
    """Row 1 sees a slot or asks a query that is not finite, row 0 does not."""
    args = dict(zip(("query", "key", "value"), inputs(), strict=True))
    clean = both(*args.values(), **rules(name))
    args[where][1, 2] = bad
    for i, (found, expected) in enumerate(zip(both(*args.values(), **rules(name)), clean, strict=True)):
        assert torch.equal(found[0], expected[0])
        hit = found[1, 2] if where == "query" else found[1]
        if where == "value" and i == 2:
            assert torch.equal(hit, expected[1])  # a log-sum-exp is made of keys
        else:
            assert not hit.isfinite().any()
            assert i == 2 or where == "value" or hit.isnan().all()


def test_without_any_rule_it_shows_too(backend):
    for where in range(3):
        args = list(inputs())
        args[where][0, 1] = NAN
        out, _, lse = both(*args)
        assert out[0, 1].isnan().all() and not out[1].isnan().any()
        assert where == 2 or lse[0, 1].isnan().all()


@pytest.mark.parametrize("scale", [10.0, -10.0])
def test_a_score_that_only_its_scale_makes_infinite(scale, backend):
    q, k, v = inputs()
    q[1, 2], k[1, 3] = torch.zeros(D), torch.zeros(D)
    q[1, 2, :, 0], k[1, 3, :, 0] = 1e19, scale * 1e18
    hit = torch.zeros(B, N, dtype=torch.bool)
    hit[1, 2] = True
    for found in both(q, k, v, scale=scale):
        assert not found[hit].isfinite().any() and found[~hit].isfinite().all()


@pytest.mark.parametrize("name", ["mask", "block_ids"])
@pytest.mark.parametrize("where", ["key", "value", "one number of a value"])
def test_a_slot_that_some_queries_see(where, name, backend):
    """NaN reaches the queries that see it and no others, of the head and in the place where it is."""
    q, k, v = inputs()
    options = rules(name)
    if name == "mask":
        options["mask"][0, 2, 7] = True
    else:
        options["block_ids"][0][0, 2] = 1
    clean = both(q, k, v, **options)
    if where == "key":
        k[0, 7, 1] = NAN
    elif where == "value":
        v[0, 7, 1] = NAN
    else:
        v[0, 7, 1, 3] = NAN
    hit = torch.zeros(B, N, HQ, D, dtype=torch.bool)
    hit[0, 2, 2:, slice(3, 4) if "one" in where else slice(None)] = True  # query heads 2 and 3 read key head 1
    out, again, lse = both(q, k, v, **options)
    for found, expected in ((out, clean[0]), (again, clean[1])):
        assert torch.equal(found.isnan(), hit)
        torch.testing.assert_close(found[~hit], expected[~hit])
    assert torch.equal(lse.isnan(), hit.all(-1) if where == "key" else torch.zeros_like(lse, dtype=torch.bool))


@pytest.mark.parametrize("name", [None, *RULES])
def test_queries_that_are_not_asked_may_hold_nan(name, backend):
    q, k, v = inputs()
    options = {"query_lengths": torch.tensor([2, 0])} | (rules(name) if name else {})
    clean = both(q, k, v, **options)
    q[0, 2:], q[1] = NAN, INF
    for found, expected in zip(both(q, k, v, **options), clean, strict=True):
        assert torch.equal(found, expected)
    assert (clean[0][1] == 0).all() and (clean[2][1] == -INF).all()


@pytest.mark.parametrize("name", ["key_ranges", "key_gaps", "key_mask", "mask", "block_ids"])
def test_a_query_without_a_key_among_nan_is_zero(name, backend):
    q, k, v = (torch.full((1, size, 2, 16), NAN) for size in (3, 5, 5))
    options = {
        "key_ranges": torch.tensor([[2, 2]]),
        "key_gaps": torch.tensor([[-1, 7]]),
        "key_mask": torch.zeros(1, 5, dtype=torch.bool),
        "mask": torch.zeros(1, 3, 5, dtype=torch.bool),
        "block_ids": (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)),
    }
    out, again, lse = both(q, k, v, **{name: options[name]})
    assert (out == 0).all() and (again == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_parts_of_the_slots_are_merged_with_their_nan(parts, interpreted):
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 300, 1, 16), torch.randn(1, 300, 1, 16)
    mask = torch.ones(1, 2, 300, dtype=torch.bool)
    mask[0, 0, 260:] = False
    attend = interpreted.cached_attention
    clean = attend(q, k, v, mask=mask, parts=parts, return_lse=True)
    v[0, 270] = NAN
    out, lse = attend(q, k, v, mask=mask, parts=parts, return_lse=True)
    assert torch.equal(out[0, 0], clean[0][0, 0]) and out[0, 1].isnan().all() and torch.equal(lse, clean[1])
    k[0, 270] = NAN
    out, lse = attend(q, k, v, mask=mask, parts=parts, return_lse=True)
    assert torch.equal(out[0, 0], clean[0][0, 0]) and torch.equal(lse[0, 0], clean[1][0, 0])
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    q[0, 1] = NAN
    out, lse = attend(q, k, v, mask=mask, parts=parts, return_lse=True)
    assert torch.equal(out[0, 0], clean[0][0, 0]) and torch.equal(lse[0, 0], clean[1][0, 0])
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()


def test_few_queries_in_plain_products():
    """The path of 33 to 191 queries on a CPU, rows of different lengths."""
    q, k, v = torch.randn(2, 40, 2, 16), torch.randn(2, 70, 2, 16), torch.randn(2, 70, 2, 16)
    options = {"query_lengths": torch.tensor([36, 40]), "key_ranges": torch.tensor([[0, 60], [4, 70]])}
    with use_backend("torch"):
        clean = cached_attention(q, k, v, **options)
        q[0, 36:], k[0, 60:], v[0, 60:], k[1, :4], v[1, :4] = (NAN,) * 5
        assert torch.equal(cached_attention(q, k, v, **options), clean)
        k[1, 4, 0] = NAN
        found = cached_attention(q, k, v, **options)
    assert torch.equal(found[0], clean[0])
    assert found[1, :, 0].isnan().all() and torch.equal(found[1, :, 1], clean[1, :, 1])


@pytest.mark.parametrize("name", ["mask", "block_ids"])
def test_one_visible_number_lets_no_hidden_one_through(name, backend):
    """Query 2 alone sees slot 6, of which one number is not finite; slot 8 is NaN and hidden from all."""
    q, k, v = inputs()
    options = rules(name)
    if name == "mask":
        options["mask"][0, 2, 6] = True
    else:
        options["block_ids"][0][0, 2] = 1
        options["block_ids"][1][0, 7:] = 2
    clean = both(q, k, v, **options)
    v[0, 6, 0, 3], v[0, 8] = -INF, NAN
    hit = torch.zeros(B, N, HQ, D, dtype=torch.bool)
    hit[0, 2, :2, 3] = True
    for found, expected in zip(both(q, k, v, **options)[:2], clean[:2], strict=True):
        assert torch.equal(~found.isfinite(), hit)
        torch.testing.assert_close(found[~hit], expected[~hit])


HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
QUICK = [(INF, 1, HALF), (NAN, 3, BRAIN), (NAN, 20, SINGLE), (INF, 8, DOUBLE)]
SWEEP = [x for x in product((NAN, INF), (1, 3, 8, 20), (HALF, BRAIN, SINGLE, DOUBLE)) if x not in QUICK]


@pytest.mark.parametrize(
    ("bad", "slots", "dtype"), [*QUICK, *(pytest.param(*x, marks=pytest.mark.slow) for x in SWEEP)]
)
def test_few_scores_of_any_dtype_show_it(bad, slots, dtype, backend):
    for where in ("query", "key", "all keys"):
        q, k, v = torch.ones(2, 3, 4, D).to(dtype), torch.ones(2, slots, 2, D).to(dtype), torch.randn(2, slots, 2, D)
        args, lengths = (q, k, v.to(dtype)), torch.tensor([2, 3])
        clean = both(*args)
        if where == "query":
            q[1, 2, 3] = bad
        else:
            k[1, slice(0, slots if "all" in where else 1), 1] = bad
        hit = torch.zeros(2, 3, 4, dtype=torch.bool)
        hit[1, 2 if where == "query" else slice(None), 3 if where == "query" else slice(2, None)] = True
        for options in ({}, {"query_lengths": lengths}, {"key_mask": torch.ones(2, slots, dtype=torch.bool)}):
            out, again, lse = both(*args, **options)
            assert out[hit].isnan().all() and again[hit].isnan().all() and not lse[hit].isfinite().any()
            sound = ~hit
            if "query_lengths" in options:
                sound[0, 2] = False
            torch.testing.assert_close(out[sound], clean[0][sound])


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_a_slot_beyond_the_first_shows_where_lengths_alone_hide(where, backend):
    args = dict(zip(("query", "key", "value"), inputs(), strict=True))
    lengths = torch.tensor([2, N])
    clean = both(*args.values(), query_lengths=lengths)
    args[where][1, 3] = NAN
    for i, (found, expected) in enumerate(zip(both(*args.values(), query_lengths=lengths), clean, strict=True)):
        assert torch.equal(found[0], expected[0])
        hit = found[1, 3] if where == "query" else found[1]
        assert hit.isnan().all() or (i == 2 and where == "value")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_do_not_see_what_is_hidden(name, return_lse):
    q, k, v = inputs()
    options = rules(name) | {"query_lengths": torch.tensor([2, 4])}

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = cached_attention(*leaves, return_lse=return_lse, **options)
        return list(torch.autograd.grad((out[0] if return_lse else out).square().sum(), leaves))

    clean = gradients()
    q[0, 2:], k[0, SEEN:], v[0, SEEN:] = NAN, NAN, NAN
    for found, expected in zip(gradients(), clean, strict=True):
        torch.testing.assert_close(found, expected)
        assert found.isfinite().all()
