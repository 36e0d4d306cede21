"""cached_attention with a gap: slots in the middle of a row that no query of it sees."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dkv.kernels import cached_attention, use_backend
from dkv.kernels.common.backend import chosen
from dkv.kernels.common.launch import Launch
from tests.kernels.sweeps import sweep
from tests.kernels.test_attention_packed import of_rows

S = 41
# First slot of the range and the one after its last; the same of the gap. Tiles of 16 slots are cut, met and left out.
LIMITS = [(0, S), (3, 35), (16, 32), (7, 9), (20, 20), (-4, S + 9)]
GAPS = [
    (0, 0),
    (16, 32),
    (5, 38),
    (1, S - 1),
    (17, 30),
    (10, 12),
    (0, 20),
    (20, S),
    (0, S),
    (-3, 60),
    (30, 10),
    (34, 36),
]


def rows(limits, gaps, queries: int = 3, dtype: torch.dtype = torch.float32) -> tuple[dict, Tensor]:
    """Packed rows, one for each of `limits` and `gaps`, and bool [B, S], what they see; all else is NaN."""
    slot, limits, gaps = torch.arange(S), torch.tensor(limits), torch.tensor(gaps)
    lengths = (torch.arange(len(gaps)) + 1) % (queries + 1)
    seen = (slot >= limits[:, :1]) & (slot < limits[:, 1:])
    seen &= ~((slot >= gaps[:, :1]) & (slot < gaps[:, 1:]))
    hidden = ~seen[:, :, None, None]
    args = {name: torch.randn(len(gaps), S, 1, 16).masked_fill(hidden, torch.nan).to(dtype) for name in FILLED}
    args |= {"query_starts": lengths.cumsum(0) - lengths, "query_lengths": lengths, "most_queries": queries}
    return args | {"q": torch.randn(int(lengths.sum()), 2, 16).to(dtype), "key_ranges": limits, "key_gaps": gaps}, seen


FILLED = ("k_buf", "v_buf")


def by_mask(args: dict, seen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition with the gap and the range written as a mask of slots."""
    others = {name: x for name, x in args.items() if name not in ("key_ranges", "key_gaps")}
    others |= {name: args[name].to(dtype) for name in ("q", *FILLED)}
    with use_backend("reference"):
        return cached_attention(**others | {"key_mask": seen}, return_lse=True)


def compare(assert_close, args: dict, seen: Tensor, call=cached_attention) -> None:
    exact, exact_lse = by_mask(args, seen, torch.float64)
    rough, _ = by_mask(args, seen, args["q"].dtype)
    _, rough_lse = by_mask(args, seen, torch.float32)
    out, lse = call(**args, return_lse=True)
    # For a kernel the log-sum-exp is no more than another store.
    for found in (out,) if call is not cached_attention or chosen() == "triton" else (out, call(**args)):
        assert_close(of_rows(args, found), of_rows(args, exact), of_rows(args, rough))
    assert_close(of_rows(args, lse), of_rows(args, exact_lse), of_rows(args, rough_lse))


@pytest.mark.parametrize("limits", sweep(LIMITS, quick=2))
def test_gaps_anywhere(limits, backend, assert_close):
    compare(assert_close, *rows([limits] * len(GAPS), GAPS))


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i else ()) for i in range(6)])
def test_random_gaps(seed, backend, assert_close):
    torch.manual_seed(seed)
    limits, gaps = torch.randint(-2, S + 3, (2, 9, 2)).tolist()
    compare(assert_close, *rows(limits, gaps, queries=6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend, assert_close):
    compare(assert_close, *rows([(0, S)] * 4, GAPS[:4], dtype=dtype))


def test_as_on_a_gpu(monkeypatch, assert_close):
    """The torch backend where nothing may be read back."""
    monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)
    with use_backend("torch"):
        compare(assert_close, *rows([(2, 39)] * len(GAPS), GAPS))


def test_strides_and_int32(restride, backend):
    args, _ = rows([(2, 39)] * 4, GAPS[1:5])
    other = args | {name: args[name].int() for name in ("key_gaps", "key_ranges")}
    other |= {name: restride(args[name]) for name in ("q", *FILLED)}
    other["key_gaps"] = torch.stack([other["key_gaps"]] * 2, -1)[..., 0]
    torch.testing.assert_close(cached_attention(**other), cached_attention(**args))


def test_gradients(assert_close):
    args, seen = rows([(2, 39)] * len(GAPS), GAPS)
    leaves = {name: args[name].clone().requires_grad_() for name in ("q", *FILLED)}

    def gradients(call, tensors: dict) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(**args | tensors).square().sum(), tensors.values())

    with use_backend("torch"):
        found = gradients(cached_attention, leaves)
    doubles = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    exact = gradients(lambda **x: by_mask(x, seen, torch.float64)[0], doubles)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y.nan_to_num(), rtol=1e-4, atol=1e-5)


TESTED = (False, True)


@pytest.mark.parametrize(("limits", "parts", "tested"), sweep(LIMITS, (1, 2, 4), TESTED, quick=9))
def test_tiles_and_parts(limits, parts, tested, interpreted, assert_close):
    """Where edges alone are tested, and with a mask of slots, where every tile is."""
    args, seen = rows([limits] * len(GAPS), GAPS)
    if tested:
        args["key_mask"] = torch.ones(len(GAPS), S, dtype=torch.bool)
    compare(assert_close, args, seen, partial(interpreted.cached_attention, launch=Launch((16, 16), 4), parts=parts))


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i else ()) for i in range(20)])
def test_hidden_tiles_are_not_visited(seed, interpreted, monkeypatch):
    """A tile takes two products. A program that has no slots may test one tile."""
    from triton.runtime.interpreter import InterpreterBuilder

    products, multiply = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *x: products.append(0) or multiply(*x))
    torch.manual_seed(seed)
    for _ in range(12):
        slots, parts = torch.randint(1, 200, ()).item(), torch.randint(1, 5, ()).item()
        limits, gap = torch.randint(-3, slots + 4, (2, 1, 2)).sort(2).values
        slot = torch.arange(slots)
        seen = (slot >= limits[0, 0]) & (slot < limits[0, 1]) & ((slot < gap[0, 0]) | (slot >= gap[0, 1]))
        tiles = len((slot[seen] // 16).unique())
        q, k = torch.randn(1, 2, 1, 16), torch.randn(1, slots, 1, 16)
        products.clear()
        how = {"launch": Launch((16, 16), 4), "parts": parts}
        interpreted.cached_attention(q, k, k, key_ranges=limits, key_gaps=gap, **how)
        share = -(-tiles // parts)
        idle = parts - -(-tiles // share) if tiles else parts
        assert 2 * tiles <= len(products) <= 2 * (tiles + idle)
