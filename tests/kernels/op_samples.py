"""What opcheck is given: the arguments of each op itself, with and without what is optional."""

import torch
from torch import Tensor

from dkv import kernels
from dkv.kernels.plan.reference import KINDS
from tests.kernels.samples import (
    FUNCTIONS,
    HQ,
    B,
    D,
    N,
    S,
    V,
    buffers,
    buffers_in_8_bits,
    eight,
    indices,
    numbers,
    of_pack,
    of_window,
    states,
    steps,
)
from tests.kernels.steps import Rows


def _plain(k: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """Buffers without scales."""
    return k, None, v, None


SAMPLES = {
    "cached_attention": lambda: [
        (q, *pair, *rules, N, 0.25, lse)
        for pair, lse in ((_plain(*buffers()), False), (_plain(*buffers()), True), (buffers_in_8_bits(), True))
        for q, *rules in (
            [numbers(B, N, HQ, D), *[None] * 9],
            [numbers(5, HQ, D), torch.tensor([2, 3]), *[None] * 5, torch.tensor([0, 2]), None, torch.arange(1, 6)],
            [
                numbers(B, N, HQ, D),
                torch.tensor([1, 3]),
                torch.tensor([[0, S], [2, 5]]),
                torch.rand(B, S) < 0.5,
                torch.rand(B, N, S) < 0.5,
                torch.randint(3, (B, N)),
                torch.randint(3, (B, S)),
                None,
                torch.tensor([[1, 3], [2, 2]]),
                None,
            ],
        )
    ],
    "attention_mass": lambda: [
        (q, *keys, *others[:4], ranges, 4, 0.25)
        for q, key, *others in [FUNCTIONS["attention_mass"][1]()]
        for keys, ranges in (((key, None), None), (buffers_in_8_bits()[:2], torch.tensor([[0, S], [2, 5]])))
    ],
    "rope_scatter_": lambda: (
        [
            (*FUNCTIONS["rope_scatter_"][1]()[:6], *pair, *options)
            for pair, options in (
                (_plain(*buffers()), [None, None, None, 0.0, None, 0.0]),
                (_plain(*buffers()), [None, indices(S, B, N), numbers(D), 1e-5, numbers(D), 1e-6]),
                (buffers_in_8_bits(), [None, None, None, 0.0, None, 0.0]),
            )
        ]
        + [
            (*given[:6], *_plain(*given[6:8]), given[8], None, None, 0.0, None, 0.0)
            for given in [FUNCTIONS["rope_scatter_, packed"][1]()]
        ]
    ),
    "choose_token": lambda: [
        (numbers(N, V), rule, heat, 1.0, "exact", None, None, [1], None, entropy, keys)
        for rule in kernels.RULES
        for heat, entropy, keys in ((0.0, True, None), (0.8, False, torch.arange(N)[:, None]))
    ],
    "choose_token_fused": lambda: [
        (numbers(N, D), weight, "margin", 0.0, 1.0, "exact", 5, 0.9, [], 20, bias is None, bias, scales, None)
        for weight, bias, scales in (
            (numbers(V, D), None, None),
            (numbers(V, D), numbers(V), None),
            (eight(V, D), None, numbers(V).exp()),
        )
    ],
    "commit_": lambda: [(*FUNCTIONS["commit_"][1](), positions) for positions in (None, torch.arange(S).expand(B, S))],
    "int8_linear": lambda: [
        (*FUNCTIONS["int8_linear"][1](), None),
        *((*given[:3], None, given[3]) for given in [FUNCTIONS["int8_linear of experts"][1]()]),
    ],
    "int4_linear": lambda: [(*FUNCTIONS["int4_linear"][1](), None)],
    "row_change": lambda: [states(), (lambda x, _, *others: (x, None, *others))(*states())],
    "keep_rows_": lambda: [states(entries=True), (*states(), None)],
    "plan": lambda: [
        (*given, others.get("chosen"), others.get("everything"), others["cut"], others["invalid"], kind, *flags)
        for kind, everything, flags in zip(
            KINDS,
            (False, True, False, True),
            ((True, False, False), (False, True, True), (False, False, True), (True, False, True)),
            strict=True,
        )
        for given, others in [Rows.random(B, S).plan(kind, everything)]
    ],
    "pack": lambda: [(*of_pack(), B * S, total, shifted) for total, shifted in ((B * S, False), (B * S + 3, True))],
    "with_masked_window": lambda: [(chosen, masked[:, :-1], centers, 2) for chosen, masked, centers in [of_window()]],
    "advance_": lambda: [steps("open", "fixed"), steps("window", "factor"), steps("open", "entropy")],
}
