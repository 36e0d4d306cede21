"""Every operation as a custom op takes it: functions of tensors alone, their inputs, and arguments of the op itself."""

import torch
from torch import Tensor

from dkv import kernels
from dkv.kernels.commit.reference import Chosen, Pass, Rules, State
from tests.kernels.steps import Rows

B, N, S, HQ, HKV, D, P, V = 2, 3, 7, 4, 2, 16, 9, 33


def numbers(*size: int) -> Tensor:
    return torch.randn(size)


def indices(high: int, *size: int) -> Tensor:
    return torch.rand(*size[:-1], high).argsort(-1)[..., : size[-1]]


def buffers() -> tuple[Tensor, Tensor]:
    return numbers(B, S, HKV, D), numbers(B, S, HKV, D)


def buffers_in_8_bits() -> tuple[Tensor, ...]:
    """Numbers and scales of keys, and of values."""
    return *kernels.rounded(numbers(B, S, HKV, D)), *kernels.rounded(numbers(B, S, HKV, D))


# Every operation as a function of tensors alone, and its inputs; what it writes in place is among the outputs.
def _attend(q, k, v, ranges):
    return kernels.cached_attention(q, k, v, key_ranges=ranges, return_lse=True)


def _attend_packed(q, k, v, starts, lengths):
    return kernels.cached_attention(q, k, v, query_starts=starts, query_lengths=lengths, most_queries=4)


def _attend_in_8_bits(q, k, k_scales, v, v_scales, ranges):
    return kernels.cached_attention(q, kernels.Stored(k, k_scales), kernels.Stored(v, v_scales), key_ranges=ranges)


def _mass_in_8_bits(q, k, scales, *others):
    return _mass(q, kernels.Stored(k, scales), *others)


def _rope_scatter_in_8_bits(q, k, v, cos, sin, positions, k_buf, k_scales, v_buf, v_scales):
    pair = kernels.Stored(k_buf, k_scales), kernels.Stored(v_buf, v_scales)
    return kernels.rope_scatter_(q, k, v, cos, sin, positions, *pair, validate=False), *pair[0], *pair[1]


def _mass(q, k, lse, weight, starts, lengths, ranges):
    rows = {"query_starts": starts, "query_lengths": lengths, "most_queries": 4, "key_ranges": ranges}
    return kernels.attention_mass(q, k, lse, weight, **rows)


def _rope_scatter(q, k, v, cos, sin, positions, k_buf, v_buf, gain):
    out = kernels.rope_scatter_(q, k, v, cos, sin, positions, k_buf, v_buf, q_norm=(gain, 1e-6), validate=False)
    return out, k_buf, v_buf


def _rope_scatter_packed(q, k, v, cos, sin, positions, k_buf, v_buf, rows):
    return kernels.rope_scatter_(q, k, v, cos, sin, positions, k_buf, v_buf, rows=rows, validate=False), k_buf, v_buf


def _choose(logits, keys):
    how = {"temperature": 0.7, "row_keys": keys, "banned": (1,), "validate": False}
    return *kernels.choose_token(logits, **how), *kernels.choose_token(logits, return_entropy=True, **how)


def _choose_fused(hidden, weight, bias):
    how = {"head_bias": bias, "vocab_limit": 30, "validate": False}
    plain = kernels.choose_token_fused(hidden, weight, rule="entropy", **how)
    return *plain, *kernels.choose_token_fused(hidden, weight, rule="margin", return_entropy=True, **how)


def eight(*size: int) -> Tensor:
    """Weights in 8 bits."""
    return torch.randint(-127, 128, size, dtype=torch.int8)


def _experts(x, weight, scales, ends):
    return kernels.int8_linear(x, weight, scales, ends=ends)


def _commit(canvas, token, confidence, eligible, count):
    return kernels.commit_(canvas, token, confidence, eligible, count, validate=False), canvas


def _change(x, delta, kept, positions, rows):
    return kernels.row_change(x, kept, positions, rows, delta=delta, validate=False)


def _keep(x, delta, kept, positions, rows, entries):
    return kernels.keep_rows_(x, kept, positions, rows, entries=entries, delta=delta, validate=False), kept


def states(entries: bool = False) -> tuple[Tensor, ...]:
    """Hidden states of N entries, two of them going on, and what was kept."""
    slots = (
        (indices(S, 2), torch.tensor([1, 0]), torch.tensor([2, 0]))
        if entries
        else (indices(S, N), indices(B, N, 1)[:, 0])
    )
    return numbers(N, D), numbers(N, D), numbers(B, S, D), *slots


def _plan(now, masked, rank, lengths, active, cut, invalid, chosen):
    state = (now, masked[:, :-1], rank, lengths, active)
    return kernels.plan_pass(*state, cut=cut, invalid=invalid, chosen=chosen, kind="window", shifted=True)


def _pack(tokens, active, scored, lengths, report):
    return kernels.pack_pass(tokens, active, scored, lengths, report, B * S + 1, B * S + 2, shifted=True)


def _window(chosen, masked, centers):
    return kernels.with_masked_window(chosen, masked[:, :-1], centers, 2)


def _advance(tokens, masked, *others):
    # Masks are kept as a view: the last column is left out.
    state, (table, *rest) = State(tokens, masked[:, :-1], *others[:7]), others[7:]
    passed, choice = Pass(*rest[:6]), Chosen(*rest[6:10])
    kernels.advance_(state, table, passed, choice, Rules(rest[10], 0, "threshold", -0.5))
    return tokens, masked, *others[:7]


def _of_plan() -> tuple[Tensor, ...]:
    rows = Rows.random(B, S)
    (now, masked, *state), others = rows.plan("window")
    return now, masked._base, *state, others["cut"], others["invalid"], others["chosen"]


def of_pack() -> tuple[Tensor, ...]:
    rows = Rows.random(B, S)
    given, others = rows.plan()
    active, scored, _, _, report = kernels.plan_pass(*given, **others)
    return rows.state.tokens, active, scored, rows.lengths, report


def of_window() -> tuple[Tensor, ...]:
    return torch.rand(B, S) < 0.2, Rows.random(B, S).state.masked._base, torch.tensor([[1, S], [4, 0]])


def _of_advance() -> tuple[Tensor, ...]:
    rows = Rows.random(B, S)
    tokens, masked, *others = rows.state
    passed, choice = rows.passed("window", filling=2, by_row=True)
    return tokens, masked._base, *others, rows.table, *passed, *choice, torch.tensor([1, 25])


def steps(kind: str, rule: str) -> tuple:
    """Arguments of the op `advance_` for a pass of a kind, with ends or without."""
    rows = Rows.random(B, S)
    passed, choice = rows.passed(kind, filling=1)
    ends = None if kind == "open" else torch.tensor([1, 25])
    return *rows.state, rows.table, *passed, *choice, ends, 7, rule, -0.5, rule == "factor", -0.7, 2


FUNCTIONS = {
    "rms_norm": (
        lambda *given: kernels.rms_norm(given[0], given[2], residual=given[1]),
        lambda: (numbers(B, N, D), numbers(B, N, D), numbers(D)),
    ),
    "int8_linear": (
        kernels.int8_linear,
        lambda: (numbers(B, N, D), eight(V, D), numbers(V).exp(), numbers(V)),
    ),
    "int8_linear of experts": (
        _experts,
        lambda: (numbers(N, D), eight(B, V, D), numbers(B, V).exp(), torch.tensor([1, N], dtype=torch.int32)),
    ),
    "int4_linear": (kernels.int4_linear, lambda: (numbers(B, N, 64), *kernels.packed4(numbers(V, 64)), numbers(V))),
    "swiglu": (kernels.swiglu, lambda: (numbers(B, N, D),)),
    "cached_attention": (_attend, lambda: (numbers(B, N, HQ, D), *buffers(), torch.tensor([[0, S], [2, 5]]))),
    "cached_attention, in 8 bits": (
        _attend_in_8_bits,
        lambda: (numbers(B, N, HQ, D), *buffers_in_8_bits(), torch.tensor([[0, S], [2, 5]])),
    ),
    "attention_mass, in 8 bits": (
        _mass_in_8_bits,
        lambda: (numbers(B * N, HQ, D), *buffers_in_8_bits()[:2], *FUNCTIONS["attention_mass"][1]()[2:]),
    ),
    "rope_scatter_, in 8 bits": (
        _rope_scatter_in_8_bits,
        lambda: (*FUNCTIONS["rope_scatter_"][1]()[:6], *buffers_in_8_bits()),
    ),
    "cached_attention, packed": (
        _attend_packed,
        lambda: (numbers(B * N, HQ, D), *buffers(), torch.tensor([0, 2]), torch.tensor([2, 4])),
    ),
    "attention_mass": (
        _mass,
        lambda: (
            numbers(B * N, HQ, D),
            buffers()[0],
            numbers(B * N, HQ) + 5,
            numbers(B * N),
            torch.tensor([0, 2]),
            torch.tensor([2, 4]),
            torch.tensor([[0, S], [2, 5]]),
        ),
    ),
    "rope_scatter_": (
        _rope_scatter,
        lambda: (
            numbers(B, N, HQ, D),
            numbers(B, N, HKV, D),
            numbers(B, N, HKV, D),
            numbers(P, D // 2),
            numbers(P, D // 2),
            indices(S, B, N),
            *buffers(),
            numbers(D),
        ),
    ),
    "rope_scatter_, packed": (
        _rope_scatter_packed,
        lambda: (
            numbers(N, HQ, D),
            numbers(N, HKV, D),
            numbers(N, HKV, D),
            numbers(P, D // 2),
            numbers(P, D // 2),
            indices(S, N),
            *buffers(),
            torch.tensor([1, 0, 1]),
        ),
    ),
    "choose_token": (_choose, lambda: (numbers(N, V), torch.arange(N)[:, None])),
    "choose_token_fused": (_choose_fused, lambda: (numbers(N, D), numbers(V, D), numbers(V))),
    "commit_": (
        _commit,
        lambda: (
            torch.zeros(B, S, dtype=torch.int64),
            torch.randint(V, (B, S)),
            -torch.rand(B, S),
            torch.rand(B, S) < 0.6,
            torch.tensor([1, 3]),
        ),
    ),
    "row_change": (_change, states),
    "keep_rows_": (_keep, lambda: states(entries=True)),
    "plan_pass": (_plan, _of_plan),
    "pack_pass": (_pack, of_pack),
    "with_masked_window": (_window, of_window),
    "advance_": (_advance, _of_advance),
}
