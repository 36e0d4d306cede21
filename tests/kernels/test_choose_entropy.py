"""The entropy that a choice gives beside the confidence, against sums in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dkv.kernels import BACKENDS, RULES, choose_token, choose_token_fused, use_backend
from tests.kernels.sweeps import sweep
from tests.kernels.test_choose_token import DTYPES, choices, kept_ids

INF = float("inf")


def entropy_of(row: list[float], confidence_temperature=1.0, top_k=None, top_p=None, banned=(), vocab_limit=None, **_):
    """Of one row by the words of the docstring; None if nothing can be chosen."""
    x = [value / confidence_temperature for value in row]
    allowed = [i for i in range(len(x) if vocab_limit is None else vocab_limit) if i not in banned]
    best = max(allowed, key=lambda i: (x[i], -i))
    if x[best] == -INF:
        return None
    kept = kept_ids(x, top_k, top_p) | {best}
    top = max(kept, key=lambda i: x[i])
    others = [x[i] - x[top] for i in kept if i != top and x[i] > -INF]
    total = math.fsum(map(math.exp, others))
    return math.log1p(total) - math.fsum(math.exp(f) * f for f in others) / (1 + total)


def check(logits: Tensor, found: Tensor, rel: float = 64, **how) -> None:
    """Relative in the entropy, as small ones have to differ."""
    assert found.dtype == torch.promote_types(logits.dtype, torch.float32)
    expected = [entropy_of(row, **how) for row in logits.tolist()]
    # The definition, which has float64 alone, does not tell a probability closer to 1 than 1e-14 from 1.
    assert found.tolist() == pytest.approx(expected, rel=rel * torch.finfo(found.dtype).eps, abs=1e-13)
    assert (found >= 0).all()


@pytest.mark.parametrize("name", sorted(BACKENDS))
@given(choice=choices(), dtype=st.sampled_from(DTYPES))
def test_any_settings(name, choice, dtype):
    rows, how = choice
    logits = torch.tensor([row for row in rows if entropy_of(row, **how) is not None], dtype=dtype)
    if not len(logits):
        return
    with use_backend(name):
        token, confidence, entropy = choose_token(logits, return_entropy=True, **how)
        without = choose_token(logits, **how)
    check(logits, entropy, **how)
    assert torch.equal(token, without[0])
    torch.testing.assert_close(confidence, without[1])
    if how["rule"] == "entropy":
        assert torch.equal(entropy, -confidence)


FILTERS = [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.8}]
HEADS = [{}, {"rule": "margin", "temperature": 0.8}, {"top_k": 5}]
SIZES = [(1, 1), (5, 257), (2, 4099), (1, 20001)]


@pytest.mark.parametrize(("shape", "dtype", "rule", "heat"), sweep(SIZES, DTYPES, RULES, (0.0, 0.8), quick=5))
def test_vocabulary_sizes(shape, dtype, rule, heat, backend):
    logits = (4 * torch.randn(shape)).to(dtype)
    how = {"banned": (0, 3, 255), "vocab_limit": shape[1] - 1} if shape[1] > 1 else {}
    how |= {"temperature": heat, "confidence_temperature": heat or 1.0}
    check(logits, choose_token(logits, rule=rule, return_entropy=True, **how)[2], **how)


@pytest.mark.parametrize(("filters", "dtype"), sweep(FILTERS, DTYPES))
def test_filters(filters, dtype, backend):
    logits = torch.randn(4, 257).to(dtype)
    how = filters | {"temperature": 1.0, "confidence_temperature": 0.7, "banned": logits.argmax(-1).tolist()[:2]}
    check(logits, choose_token(logits, return_entropy=True, **how)[2], **how)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [60, 5000])
def test_small_entropies_keep_their_digits(rule, size, backend):
    """Down to 1e-11; in float32 all these probabilities are 1."""
    logits = -2 * torch.rand(40, size)
    logits[:, size // 3] = torch.linspace(16, 30, 40) + math.log(size)
    entropy = choose_token(logits, rule=rule, return_entropy=True)[2]
    assert 1e-12 < entropy.min() < 1e-10 and entropy.max() < 1e-4
    check(logits, entropy, rel=84)  # 1e-5
    assert (entropy.diff() < 0).all()


def test_uniform_and_certain(backend):
    """The most and the least that there is."""
    logits = torch.zeros(2, 3000)
    logits[1, 1:] = -INF
    entropy = choose_token(logits, return_entropy=True)[2]
    assert entropy.tolist() == [pytest.approx(math.log(3000), rel=1e-6), 0]


@pytest.mark.parametrize("rule", RULES)
def test_nan_is_nan(rule, backend):
    logits = torch.randn(5, 72)
    logits[1, 5] = logits[2, 70] = math.nan
    logits[3, 3], logits[4, :64] = INF, -INF
    for how in ({}, {"top_k": 5}):
        found = choose_token(logits, rule=rule, vocab_limit=64, return_entropy=True, validate=False, **how)[2]
        assert found.isnan().tolist() == [False, True, True, True, True]


@pytest.mark.parametrize(("how", "dtype"), sweep(HEADS, DTYPES))
def test_behind_a_head(how, dtype, backend):
    """Products that are exact in every dtype; a weight, with a bias, and a layer that gives strips."""
    hidden, weight = torch.randint(-2, 3, (7, 8)).to(dtype), (torch.randint(-2, 3, (37, 8)) / 4).to(dtype)
    bias = (torch.randint(-8, 9, (37,)) / 4).to(dtype)
    how = how | {"return_entropy": True}
    expected = choose_token(hidden @ weight.T + bias, **how)
    layer = Layer(8, 37).to(dtype).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    for head, own in ((weight, {"head_bias": bias}), (layer, {})):
        found = choose_token_fused(hidden, head, **own, **how)
        assert len(found) == 3 and torch.equal(found[0], expected[0])
        for x, y in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(x, y)


class Layer(torch.nn.Linear):
    """A head that gives its logits three columns at a time."""

    def strips(self, hidden: Tensor):
        return iter(self(hidden).split(3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_confidences_have_the_entropy_of_rounded_probabilities(dtype, backend):
    """One formula for all rules, and never below 0."""
    logits = (3 * torch.randn(6, 40)).to(dtype)
    logits[5, 1:] = -INF
    how = {"confidence_dtype": "model", "return_entropy": True}
    found = [choose_token(logits, rule=rule, **how) for rule in RULES]
    for _, _, entropy in found:
        assert (entropy >= 0).all()
        torch.testing.assert_close(entropy, -found[2][1], rtol=0, atol=1e-9)
    p = logits.softmax(-1).double()
    tolerance = max(200 * torch.finfo(dtype).eps, 1e-8)
    torch.testing.assert_close(entropy.double(), torch.special.entr(p).sum(-1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_rows_at_a_time_do_not_matter(rule, monkeypatch):
    from dkv.kernels.choose import torch as torch_choice

    hidden, weight = torch.randint(-2, 3, (7, 8)).float(), torch.randint(-2, 3, (37, 8)) / 4
    with use_backend("torch"):
        whole = choose_token_fused(hidden, weight, rule=rule, return_entropy=True)
        monkeypatch.setattr(torch_choice, "SCRATCH_BYTES", 3 * 37 * 4)
        for x, y in zip(choose_token_fused(hidden, weight, rule=rule, return_entropy=True), whole, strict=True):
            assert torch.equal(x, y)


def test_no_rows(backend):
    found = choose_token(torch.zeros(0, 5), return_entropy=True), choose_token(torch.zeros(0, 5))
    assert [len(x) for x in found] == [3, 2] and found[0][2].shape == (0,)
