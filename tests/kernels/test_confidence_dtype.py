"""confidence_dtype="model": choices and confidences as Dream's published code rounds them."""

import pytest
import torch
from torch import Tensor

from dkv.kernels import RULES, choose_token, choose_token_fused

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MODEL = {"confidence_dtype": "model"}


def as_published(logits: Tensor, rule: str, heat: float, top_k=None, top_p=None) -> tuple[Tensor, Tensor]:
    """Probabilities and the confidence of the best id, by the description of Dream's sampler: all in one dtype."""
    x = logits / heat if heat else logits
    if top_p is not None:
        for row in x:
            ordered, order = row.sort(descending=True, stable=True)
            before = ordered.softmax(0).cumsum(0)[:-1]
            row[order[1:][before > top_p]] = torch.finfo(x.dtype).min
    if top_k is not None:
        x[x < x.topk(top_k).values[:, -1:]] = torch.finfo(x.dtype).min
    p = x.softmax(-1)
    assert p.dtype == logits.dtype
    first, second = p.sort(-1, descending=True).values[:, :2].unbind(1)
    confidence = {"probability": first, "margin": first - second, "entropy": (p * (p + 1e-10).log()).sum(-1)}[rule]
    return p, confidence


def order_filled(confidence: Tensor) -> list[int]:
    """Slots in the order in which one after the other is filled: the surest, of equals the leftmost."""
    return confidence.double().sort(descending=True, stable=True).indices.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heat", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_p": 0.95, "top_k": 5}], ids=str)
def test_order_of_slots_is_that_of_the_published_code(filters, heat, rule, dtype, backend):
    logits = (torch.randn(40, 200) * torch.linspace(0.5, 6, 40)[:, None]).to(dtype)
    p, expected = as_published(logits.clone(), rule, heat, **filters)
    how = {"rule": rule, "confidence_temperature": heat or 1.0, **filters, **MODEL}
    token, confidence = choose_token(logits, **how)
    assert torch.equal(p.gather(1, token[:, None])[:, 0], p.amax(-1))
    assert order_filled(confidence) == order_filled(expected)
    if heat == 0.1 and dtype == torch.bfloat16 and not filters:
        # What the setting is there for: levels that "exact" tells apart become one.
        exact = choose_token(logits, **how | {"confidence_dtype": "exact"})[1]
        assert confidence.unique().numel() < exact.unique().numel()
        assert order_filled(exact) != order_filled(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_logarithms_of_the_rounded_numbers(rule, dtype, backend):
    logits = (3 * torch.randn(9, 33)).to(dtype)
    _, expected = as_published(logits.clone(), rule, 0.5)
    _, confidence = choose_token(logits, rule=rule, confidence_temperature=0.5, **MODEL)
    assert confidence.dtype == torch.promote_types(dtype, torch.float32)
    if rule == "entropy" and dtype == torch.float16:
        assert confidence.isfinite().all()  # where 1e-10 is 0 and the published one NaN
        return
    wide = expected.to(confidence.dtype)
    assert torch.equal(confidence, wide if rule == "entropy" else wide.log())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_drawn_from_the_rounded_probabilities(dtype, backend):
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0], dtype=dtype).expand(8000, -1)
    token, confidence = choose_token(logits, temperature=0.7, confidence_temperature=0.7, top_k=3, **MODEL)
    share = (token.bincount(minlength=4) / 8000).tolist()
    assert share == pytest.approx([0.771, 0.185, 0.044, 0], abs=0.02)
    p, _ = as_published(logits[:1].clone(), "probability", 0.7, top_k=3)
    assert torch.equal(confidence, p[0].to(confidence.dtype)[token].log())
    raw, _ = choose_token(logits, temperature=0.7, **MODEL)  # with confidences at 1, as LLaDA's
    assert (raw.bincount(minlength=4) / 8000).tolist() == pytest.approx([0.765, 0.183, 0.044, 0.001], abs=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_ids_that_may_not_be_chosen(rule, backend):
    """They keep their share, even if that leaves the others 0."""
    logits = torch.tensor([[0.0, 1.0, 90.0, 0.5], [2.0, 0.0, 0.0, 9.0]], dtype=torch.bfloat16)
    for heat in (0.0, 0.5):
        how = {"temperature": heat, "confidence_temperature": heat or 1.0, "rule": rule, **MODEL}
        token, confidence = choose_token(logits, banned=(2,), vocab_limit=3, **how)
        assert token[0] == 1 and token[1] in (0, 1)
        assert not confidence.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heat", [1e-320, 1e-38, 1e-5, 1e30, 1e300])
def test_temperatures_that_overflow(heat, dtype, backend):
    logits = torch.tensor([[10.0, 20.0, 0.0], [-5.0, -7.0, -5.5]], dtype=dtype)
    for rule in RULES:
        how = {"temperature": heat, "confidence_temperature": heat, "rule": rule, **MODEL}
        token, confidence = choose_token(logits, **how)
        assert not confidence.isnan().any()
        if heat < 1:
            assert token.tolist() == [1, 0]
            assert confidence.tolist() == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_nan_is_an_error(rule, bad, backend):
    logits = torch.zeros(2, 9, dtype=torch.bfloat16)
    logits[1, 4] = bad
    for how in ({}, {"confidence_temperature": 0.1}, {"top_p": 0.9, "top_k": 3}):
        with pytest.raises(ValueError, match="logits of row 1 hold NaN"):
            choose_token(logits, rule=rule, banned=(4,), **how, **MODEL)
    with pytest.raises(ValueError, match="no id that may be chosen"):
        choose_token(torch.tensor([[0.0, -torch.inf]]), rule=rule, banned=(0,), **MODEL)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_rounds_the_logits(rule, dtype, backend):
    hidden, weight = torch.randn(5, 16).to(dtype), torch.randn(300, 16).to(dtype)
    bias = torch.randn(300).to(dtype)
    how = {"rule": rule, "temperature": 0.3, "confidence_temperature": 0.3, "top_p": 0.9, **MODEL}
    for found, expected in zip(
        choose_token_fused(hidden, weight, head_bias=bias, **how),
        choose_token(hidden @ weight.T + bias, **how),
        strict=True,
    ):
        assert torch.equal(found, expected)


class Strips(torch.nn.Linear):
    """A head that gives wide logits a few columns at a time."""

    def strips(self, hidden):
        return iter(self(hidden).float().split(7, 1))


def test_strips_are_rounded_to_the_dtype_of_the_hidden_states(backend):
    layer = Strips(16, 30, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(5, 16, dtype=torch.bfloat16)
    for found, expected in zip(
        choose_token_fused(hidden, layer, **MODEL), choose_token(layer(hidden), **MODEL), strict=True
    ):
        assert torch.equal(found, expected)


def test_rows_do_not_depend_on_their_neighbours(backend, monkeypatch):
    from dkv.kernels.choose import torch as torch_choice

    logits = torch.randn(7, 40).bfloat16()
    how = {"temperature": 0.2, "confidence_temperature": 0.2, "rule": "entropy", **MODEL}
    keys = torch.arange(7)[:, None]
    whole = choose_token(logits, row_keys=keys, **how)
    monkeypatch.setattr(torch_choice, "SCRATCH_BYTES", 2 * 4 * 40)
    for found, expected in zip(choose_token(logits, row_keys=keys, **how), whole, strict=True):
        assert torch.equal(found, expected)


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="confidence_dtype must be one of exact, model, got 'bfloat16'"):
        choose_token(torch.zeros(1, 2), confidence_dtype="bfloat16")
