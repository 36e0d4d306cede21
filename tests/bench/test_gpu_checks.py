"""The checks of `dkv.bench.gpu`, which must notice what is wrong."""

from dataclasses import replace

import pytest
import torch

from dkv.bench.gpu import cases
from dkv.bench.gpu.checks import CHECKS, ordered, run_check
from dkv.bench.gpu.tools import Skipped
from dkv.kernels.common.backend import interpreted
from tests.bench.conftest import NAMES, fast

CPU = torch.device("cpu")


def test_checks_of_everything_together_come_first():
    names = ordered()
    assert sorted(names) == sorted(CHECKS)
    assert names[0].startswith("generation") and names.index("cuda_graph") < names.index("commit")


def wrong(operation: str):
    """A torch operation that is off in its last row."""
    right = getattr(fast(operation), NAMES.get(operation, operation))

    def run(*args, **kwargs):
        found = right(*args, **kwargs)
        # What gives nothing has written into its first argument.
        first = args[0] if found is None else found
        first = first[0] if isinstance(first, tuple) else first
        if first.dtype == torch.bool:
            first.logical_not_()
        elif first.numel():
            first[-1] += 1
        return found

    return run


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        ("cached_attention", "attention_bfloat16"),
        ("cached_attention", "attention_rules"),
        ("attention_mass", "attention_mass_bfloat16"),
        ("rope_scatter_", "rope_scatter_float16"),
        ("choose_token", "choose_token_entropy"),
        ("choose_token", "choose_token_tail"),
        ("choose_token", "choose_token_filters"),
        ("choose_token_fused", "choose_token_fused_float32"),
        ("commit_", "commit"),
        ("plan_pass", "plan_open"),
        ("pack_pass", "plan_chosen"),
        ("with_masked_window", "plan_window"),
        ("advance_", "advance_fixed"),
        ("advance_", "advance_factor"),
        ("advance_", "advance_entropy"),
    ],
)
def test_a_wrong_operation_is_noticed(monkeypatch, operation, check):
    run_check(check, CPU, "torch")
    monkeypatch.setattr(fast(operation), NAMES.get(operation, operation), wrong(operation))
    with pytest.raises((AssertionError, RuntimeError)):
        run_check(check, CPU, "torch")


@pytest.mark.parametrize("operation", ["cached_attention", "rope_scatter_"])
def test_what_is_read_or_written_beside_a_tensor_is_noticed(monkeypatch, operation):
    right = getattr(fast(operation), operation)

    def careless(*given, **hints):
        found, q = right(*given, **hints), given[0]
        if operation == "cached_attention" and q._base is not None:
            found[0].add_(q._base.flatten()[0])
        elif operation == "rope_scatter_" and (v_buf := given[7].numbers)._base is not None:
            v_buf._base.flatten()[0] = 0
        return found

    monkeypatch.setattr(fast(operation), operation, careless)
    with pytest.raises(AssertionError, match="differ"):
        run_check("nothing_beside_a_tensor_is_used_float32", CPU, "torch")


def test_tokens_that_are_not_drawn_are_noticed(monkeypatch):
    right = fast("choose_token").choose_token

    def best(logits, choice, row_keys, **hints):
        return right(logits, replace(choice, temperature=0.0), None)

    monkeypatch.setattr(fast("choose_token"), "choose_token", best)
    for name in ("sampling_distribution", "drawn_tokens_are_those_of_the_definition"):
        with pytest.raises(AssertionError):
            run_check(name, CPU, "torch")


@pytest.mark.parametrize("operation", ["choose_token", "choose_token_fused"])
def test_a_wrong_entropy_is_noticed(monkeypatch, operation):
    run_check("entropies_margin", CPU, "torch")
    right = getattr(fast(operation), operation)

    def wrong(*args, **hints):
        token, confidence, entropy = right(*args, **hints)
        return token, confidence, entropy * 1.001 + 0.1

    monkeypatch.setattr(fast(operation), operation, wrong)
    with pytest.raises(AssertionError, match="result 2 is off"):
        run_check("entropies_margin", CPU, "torch")


def test_error_is_a_share_of_the_largest_value_and_takes_no_nan():
    exact = torch.tensor([1.0, -4.0, -torch.inf], dtype=torch.float64)
    assert cases.error(exact.float(), exact) == 0 and cases.error(exact[:0], exact[:0]) == 0
    assert cases.error(torch.tensor([1.5, -4.0, -torch.inf]), exact) == 0.125
    assert cases.error(torch.tensor([1.0, torch.nan, -torch.inf]), exact) > 1e30
    assert cases.error(torch.tensor([1.0, -4.0, 0.0]), exact) > 1e30
    assert cases.error(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5


# Those that the interpreter makes in seconds.
@pytest.mark.parametrize(
    "name",
    [
        "attention_bfloat16",
        "rope_scatter_float32",
        "integers_of_both_widths",
        "choose_token_tail",
        "wrong_index_is_refused_before_the_launch_9",
        "nothing_beside_a_tensor_is_used_float32",
        "plan_window",
        "advance_factor",
        "advance_entropy",
        "advance_near",
    ],
)
def test_checks_pass_in_the_interpreter(name):
    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    try:
        run_check(name, CPU, "triton")
    except Skipped as reason:
        pytest.skip(str(reason))
