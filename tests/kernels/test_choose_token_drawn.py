"""choose_token: how often a token is drawn, what filters keep, and temperatures that overflow."""

import math

import pytest
import torch

from dkv.kernels import BACKENDS, choose_token, use_backend
from tests.kernels.sweeps import sweep

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def frequencies(logits: list[float], dtype=torch.float32, draws: int = 6_000, **how) -> list[float]:
    rows = torch.tensor(logits, dtype=dtype).expand(draws, -1)
    token, _ = choose_token(rows, row_keys=torch.arange(draws)[:, None], **how)
    return (token.bincount(minlength=len(logits)) / draws).tolist()


def test_C06_frequencies_of_large_logits(backend):
    assert frequencies([800.0, 799.0], temperature=1.0)[1] == pytest.approx(0.269, abs=0.015)


@pytest.mark.parametrize("dtype", sweep(DTYPES))
def test_C06_frequencies_in_low_precision(dtype, backend):
    drawn = frequencies([2.0, 1.0, 0.0], dtype, temperature=0.7)
    assert drawn == pytest.approx([0.771, 0.185, 0.044], abs=0.015)


@pytest.mark.parametrize("confidence_temperature", [0.3, pytest.param(4.0, marks=pytest.mark.slow)])
def test_frequencies_do_not_depend_on_the_temperature_of_the_confidence(confidence_temperature, backend):
    drawn = frequencies([2.0, 1.0, 0.0], temperature=0.7, confidence_temperature=confidence_temperature)
    assert drawn == pytest.approx([0.771, 0.185, 0.044], abs=0.015)


@pytest.mark.parametrize("how", [{}, {"temperature": 1e-6}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_C06_limits_of_sampling(how, backend):
    assert frequencies([2.0, 1.0, 2.5, 0.0], draws=200, **how) == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [1]), (1e-6, [1]), (0.5, [1]), (0.65, [1, 2]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_C07_top_p(top_p, kept, backend):
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0]).expand(2000, 4)
    token, confidence = choose_token(logits, temperature=1.0, top_p=top_p)
    assert token.unique().tolist() == kept
    expected = logits[0, kept].log_softmax(0)[[kept.index(i) for i in token.tolist()]]
    torch.testing.assert_close(confidence, expected)
    assert (choose_token(logits[:1], top_p=top_p)[0] == 1).all()


def test_C07_ties_at_the_cut_keep_an_id(backend):
    even = torch.zeros(50, 2)
    assert choose_token(even, temperature=1.0, top_p=0.5)[0].unique().tolist() == [0, 1]
    assert choose_token(even, temperature=1.0, top_p=0.49)[0].unique().tolist() == [0]
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(50, 4)
    assert choose_token(logits, temperature=1.0, top_p=0.0)[0].unique().tolist() == [0]
    assert choose_token(logits, temperature=1.0, top_k=1)[0].unique().tolist() == [0, 1, 2]


EXTREMES = [1e-320, 1e-300, 1e-38, 1e30, 3e38, 1e300]


@pytest.mark.parametrize(("heat", "dtype"), sweep(EXTREMES, DTYPES))
def test_temperatures_that_overflow(heat, dtype, backend):
    """A low one takes the best id, of equal ones the lowest; a high one leaves all ids alike."""
    logits = torch.tensor([[10.0, 20.0, 0.0], [-5.0, -7.0, -5.5], [3.0, 8.0, 8.0]], dtype=dtype)
    if heat < 1:
        assert choose_token(logits, temperature=heat)[0].tolist() == [1, 0, 1]
        assert choose_token(logits, temperature=heat, banned=(1,))[0].tolist() == [0, 0, 2]
    elif dtype != torch.float64 or heat == 1e300:
        drawn = frequencies([0.0, 1.0], dtype, draws=2000, temperature=heat)
        assert drawn == pytest.approx([0.5, 0.5], abs=0.05)
    for filters in ({}, {"top_k": 2}, {"top_p": 0.9}):
        both = {"temperature": heat, "confidence_temperature": heat, **filters}
        for how in ({"confidence_temperature": heat, **filters}, both):
            token, confidence = choose_token(logits, **how)
            ids = 2 if "top_k" in filters else 3
            expected = [0.0, 0.0, -math.log(2)] if heat < 1 else [-math.log(ids)] * 3
            assert confidence.tolist() == pytest.approx(expected, abs=1e-6)
            assert heat > 1 or token.tolist() == [1, 0, 1]
        _, entropy = choose_token(logits, rule="entropy", **both)
        assert entropy.tolist() == pytest.approx(expected, abs=1e-6)
    _, margin = choose_token(logits[:2], rule="margin", confidence_temperature=heat)
    assert heat > 1 or margin.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_low_temperatures_across_strips_and_parts(name):
    logits = torch.zeros(2, 20_001)
    logits[:, 3], logits[0, 20_000], logits[1, 9_000] = 9.0, 9.5, 9.0
    with use_backend(name):
        for how in ({"temperature": 1e-38}, {"confidence_temperature": 1e-38}):
            token, confidence = choose_token(logits, **how)
            assert token.tolist() == [20_000, 3]
            assert confidence.isfinite().all()
