"""Every operation on no rows, no queries, no slots: nothing comes out, and nothing fails."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dkv import kernels
from dkv.kernels.commit.reference import RULES, Chosen, Pass, Rules
from dkv.kernels.plan.reference import KINDS
from tests.kernels.steps import Rows

SIZES = [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0), (2, 0, 0)]
sizes = pytest.mark.parametrize("size", SIZES, ids="B{0[0]}-N{0[1]}-S{0[2]}".format)
CHOICES = [
    {},
    {"temperature": 1.0},
    {"top_k": 1},
    {"top_p": 0.5, "temperature": 1.0},
    {"rule": "margin"},
    {"rule": "entropy"},
    {"confidence_dtype": "model", "rule": "margin", "temperature": 0.5, "confidence_temperature": 0.5},
]


def longs(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int64)


def rules(b: int, n: int, s: int) -> dict:
    return {
        "query_lengths": longs(b),
        "key_ranges": torch.tensor([0, s]).expand(b, 2),
        "key_gaps": torch.tensor([0, s]).expand(b, 2),
        "key_mask": torch.ones(b, s, dtype=torch.bool),
        "mask": torch.ones(b, n, s, dtype=torch.bool),
        "block_ids": (longs(b, n), longs(b, s)),
    }


@sizes
@pytest.mark.parametrize("names", [[], *([name] for name in rules(1, 1, 1)), list(rules(1, 1, 1))], ids="+".join)
def test_attention(names, size, backend):
    b, n, s = size
    options = {name: rules(b, n, s)[name] for name in names}
    q, k = torch.randn(b, n, 4, 16), torch.randn(b, s, 2, 16)
    out, lse = kernels.cached_attention(q, k, k, return_lse=True, **options)
    for x in (out, kernels.cached_attention(q, k, k, **options)):
        assert x.shape == q.shape and (x == 0).all()
    assert lse.shape == (b, n, 4) and (lse == -torch.inf).all()
    if b == 0:
        leaf = q.requires_grad_()
        assert torch.autograd.grad(kernels.cached_attention(leaf, k, k, **options).sum(), leaf)[0].shape == q.shape


@pytest.mark.parametrize("size", [size for size in SIZES if 0 in size[:2]], ids="B{0[0]}-N{0[1]}-S{0[2]}".format)
def test_rows_and_writes(size, backend):
    b, n, s = size
    index = longs(b, n)
    q, k, tables = torch.randn(b, n, 4, 16), torch.randn(b, n, 2, 16), torch.randn(2, 7, 8)
    buffers = torch.randn(2, b, s, 2, 16)
    before = buffers.clone()
    assert kernels.rope_scatter_(q, k, k, *tables, index, *buffers).shape == q.shape
    assert torch.equal(buffers, before)
    eligible = torch.ones(b, n, dtype=torch.bool)
    committed = kernels.commit_(longs(b, s), index, torch.zeros(b, n), eligible, longs(b), positions=index)
    assert committed.shape == (b, n)


@pytest.mark.parametrize("how", CHOICES, ids=str)
def test_choices(how, backend):
    for token, confidence in (
        kernels.choose_token(torch.zeros(0, 5), **how),
        kernels.choose_token_fused(torch.zeros(0, 3), torch.zeros(5, 3), head_bias=torch.zeros(5), **how),
    ):
        assert token.shape == confidence.shape == (0,)
    token, _ = kernels.choose_token_fused(torch.zeros(2, 0), torch.zeros(1, 0), **how)
    assert token.tolist() == [0, 0]
    with pytest.raises(ValueError, match="logits must have at least one id"):
        kernels.choose_token(torch.zeros(2, 0), **how)


def test_a_head_size_of_zero_is_refused(backend):
    with pytest.raises(ValueError, match="q must have a head size of at least 1"):
        kernels.cached_attention(*(torch.zeros(1, 2, 1, 0) for _ in range(3)))


def _attend(q, k, ranges):
    return kernels.cached_attention(q, k, k, key_ranges=ranges)


def _commit(canvas, confidence, eligible, count):
    return kernels.commit_(canvas, canvas, confidence, eligible, count, validate=False)


@pytest.mark.parametrize("compiled", [False, True], ids=["fake", "compiled"])
def test_recorded(compiled, backend):
    for function, args in (
        (_attend, (torch.randn(0, 3, 4, 16), torch.randn(0, 5, 2, 16), longs(0, 2))),
        (_commit, (longs(0, 5), torch.randn(0, 5), longs(0, 5).bool(), longs(0))),
    ):
        real = function(*args)
        if compiled:
            found = torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
        else:
            with FakeTensorMode() as mode:
                found = function(*(mode.from_tensor(x) for x in args))
        assert found.shape == real.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(0, 5), (2, 0), (0, 0)], ids="B{0[0]}-S{0[1]}".format)
def test_state_of_the_rows(size, kind, backend):
    """A step of rows without slots, and of no rows; entries that fill up a pass are of row 0, where there is one."""
    rows = Rows.random(*size)
    given, others = rows.plan(kind)
    active, scored, eligible, count, report = kernels.plan_pass(*given, **others)
    assert active.shape == scored.shape == size and report.shape == (5, size[0]) and count.shape == size[:1]
    assert (report[:3] == 0).all() and report[3].equal(others["cut"])
    filling = 3 if size[0] else 0
    tokens, positions, of_entry, slots, *_ = kernels.pack_pass(
        rows.state.tokens, active, scored, rows.lengths, report, filling, filling
    )
    assert tokens.tolist() == rows.state.tokens[:1, -1:].flatten().tolist() * filling
    assert positions.tolist() == slots.tolist() == [size[1]] * filling and of_entry.tolist() == [0] * filling
    assert kernels.with_masked_window(active, rows.state.masked, longs(size[0], 2), 4).shape == size
    for rule in RULES:
        state = rows.copy()
        passed = Pass(active, scored, eligible, count, longs(size[0]))
        choice = Chosen(tokens, *torch.zeros(3, filling))
        kernels.advance_(state, rows.table, passed, choice, Rules(longs(1), 0, rule, 0.5))
        for x, y in zip(state, rows.state, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_scored_slots_fills_nothing(rule, backend):
    rows = Rows.random(3, 8)
    passed, _ = rows.passed()
    state, none = rows.copy(), torch.zeros(0)
    kernels.advance_(state, rows.table, passed, Chosen(longs(0), none, none, none), Rules(None, 0, rule, 0.5))
    assert torch.equal(state.tokens, rows.state.tokens) and torch.equal(state.masked, rows.state.masked)
    unfinished = rows.state.masked.any(1)
    assert not state.fresh[unfinished].any() and (state.at != rows.state.at)[unfinished].any()


@pytest.mark.parametrize("totals", [(1, 0), (0, 1), (-1, 0)])
def test_entries_of_no_rows_are_refused(totals, backend):
    given = longs(0, 6), longs(0, 5).bool(), longs(0, 5).bool(), longs(0), longs(5, 0)
    with pytest.raises(ValueError, match="total must be"):
        kernels.pack_pass(*given, *totals)


def test_a_window_of_fewer_than_no_slots_is_refused(backend):
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        kernels.with_masked_window(longs(1, 5).bool(), longs(1, 5).bool(), longs(1, 1), -1)
