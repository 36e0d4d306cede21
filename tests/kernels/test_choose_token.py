"""choose_token: the token and its confidence, greedy and sampled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dkv.kernels import BACKENDS, RULES, choose_token, use_backend
from dkv.kernels.common import noise
from tests.kernels.sweeps import sweep

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INF = float("inf")


def kept_ids(x: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """What top-p, and then top-k, leave: best first, ties by id."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if top_p is not None and top_p < 1:
        weight = [math.exp(x[i] - x[order[0]]) for i in order]
        before = [math.fsum(weight[:place]) / math.fsum(weight) for place in range(len(x))]
        order = [i for place, i in enumerate(order) if place == 0 or before[place] <= top_p]
    if top_k is not None and top_k < len(order):
        order = [i for i in order if x[i] >= x[order[top_k - 1]]]
    return set(order)


def by_definition(
    row: list[float],
    rule: str = "probability",
    temperature: float = 0,
    confidence_temperature: float = 1,
    top_k: int | None = None,
    top_p: float | None = None,
    banned=(),
    vocab_limit: int | None = None,
    gumbel=None,
):
    """Token and log-confidence of one row by the words of the docstring; None if nothing can be chosen."""
    x = [value / confidence_temperature for value in row]
    allowed = [i for i in range(len(x) if vocab_limit is None else vocab_limit) if i not in banned]
    best = max(allowed, key=lambda i: (x[i], -i))
    if x[best] == -INF:
        return None
    kept = kept_ids(x, top_k, top_p) | {best}
    candidates = sorted(kept.intersection(allowed), key=lambda i: (-x[i], i))
    token = best
    if temperature > 0:
        token = max(candidates, key=lambda i: row[i] / temperature + gumbel[i])

    top = max(kept, key=lambda i: x[i])
    log_total = math.log1p(math.fsum(math.exp(x[i] - x[top]) for i in kept if i != top))
    log_p = {i: x[i] - x[top] - log_total for i in kept if x[i] > -INF}
    if rule == "entropy":
        return token, math.fsum(math.exp(p) * p for p in log_p.values())
    if rule == "margin":
        gap = x[candidates[0]] - x[candidates[1]] if len(candidates) > 1 else INF
        return token, log_p[best] + math.log1p(-math.exp(-gap)) if gap > 0 else -INF
    return token, log_p[token]


def check(logits: Tensor, first: int = 0, **how) -> None:
    """choose_token against the definition; relative in the confidence, as probabilities near 1 have to differ."""
    keys = torch.arange(len(logits))[:, None] + first
    gumbel = noise.gumbel(keys, logits.shape[1]).tolist()
    expected = [by_definition(row, gumbel=g, **how) for row, g in zip(logits.tolist(), gumbel, strict=True)]
    if None in expected:
        with pytest.raises(ValueError, match=f"^logits of row {expected.index(None)} hold"):
            choose_token(logits, row_keys=keys, **how)
        return
    token, confidence = choose_token(logits, row_keys=keys, **how)
    assert token.tolist() == [token for token, _ in expected]
    assert token.dtype == torch.int64
    assert confidence.dtype == torch.promote_types(logits.dtype, torch.float32)
    # 1e-14: float64 itself does not tell a probability closer to 1 than that from 1.
    tolerance = 64 * torch.finfo(confidence.dtype).eps
    assert confidence.tolist() == pytest.approx([c for _, c in expected], rel=tolerance, abs=1e-14)


@st.composite
def choices(draw) -> tuple[list[list[float]], dict]:
    """Logits of few levels, so that ties are common, and any settings."""
    v = draw(st.integers(1, 12))
    level = st.sampled_from([-INF, -2.0, -1.0, 0.0, 0.25, 3.0, 20.0])
    rows = draw(st.lists(st.lists(level, min_size=v, max_size=v), min_size=1, max_size=3))
    limit = draw(st.none() | st.integers(1, v))
    return rows, {
        "rule": draw(st.sampled_from(RULES)),
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "confidence_temperature": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "top_k": draw(st.none() | st.integers(1, v + 1)),
        # Not a probability that equal levels can add up to: there rounding decides.
        "top_p": draw(st.sampled_from([None, 0.0, 0.301, 0.87, 1.0])),
        "vocab_limit": limit,
        "banned": draw(st.lists(st.integers(0, v - 1), max_size=min(3, (limit or v) - 1))),
    }


@pytest.mark.parametrize("name", sorted(BACKENDS))
@given(choice=choices(), dtype=st.sampled_from(DTYPES), first=st.integers(0, 2**40))
def test_any_settings(name, choice, dtype, first):
    rows, how = choice
    with use_backend(name):
        check(torch.tensor(rows, dtype=dtype), first, **how)


SIZES = [(1, 1), (5, 257), (2, 4099), (1, 20001)]


@pytest.mark.parametrize(("shape", "dtype", "rule", "temperature"), sweep(SIZES, DTYPES, RULES, (0.0, 0.8), quick=5))
def test_vocabulary_sizes(shape, dtype, rule, temperature, backend):
    logits = (4 * torch.randn(shape)).to(dtype)
    how = {"banned": (0, 3, 255), "vocab_limit": shape[1] - 1} if shape[1] > 1 else {}
    check(logits, rule=rule, temperature=temperature, **how)


@pytest.mark.parametrize("filters", [{"top_k": 9}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_filters(filters, rule, backend):
    logits = torch.randn(4, 257)
    top = logits.argmax(-1).tolist()
    for temperature in (0.0, 1.0):
        check(logits, rule=rule, temperature=temperature, confidence_temperature=0.7, banned=top[:2], **filters)


@pytest.mark.parametrize("rule", RULES)
def test_probabilities_near_one_stay_apart(rule, backend):
    """The order of float64 at the cost of float32: in float32 all these probabilities are 1."""
    gaps = torch.linspace(18, 26, 30)
    logits = torch.stack([gaps, torch.zeros(30), torch.full((30,), -1.0)], 1)
    assert logits.softmax(-1)[:, 0].unique().numel() == 1
    _, confidence = choose_token(logits, rule=rule)
    assert (confidence.diff() > 0).all()
    check(logits, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_probabilities_near_one_of_a_token_that_is_not_chosen(rule, backend):
    logits = torch.tensor([[-2.0, 20.0], [-1.0, 20.0]])
    check(logits, rule=rule, vocab_limit=1)
    check(logits, rule=rule, banned=(1,))
    token, _ = choose_token(logits.repeat(50, 1), temperature=50.0)
    assert token.unique().tolist() == [0, 1]
    check(logits.repeat(50, 1), rule=rule, temperature=50.0)


@pytest.mark.parametrize("rule", RULES)
def test_an_id_that_is_banned_and_beyond_the_limit_counts_once(rule, backend):
    check(torch.tensor([[0.0, 1.0, 2.0, 2.5]]), rule=rule, vocab_limit=2, banned=(3, 3))


def test_input_is_left_alone(backend):
    logits = torch.randn(4, 33)
    before = logits.clone()
    choose_token(logits, rule="entropy", temperature=1.0, top_p=0.9, banned=(2,), vocab_limit=30)
    assert torch.equal(logits, before)


def test_no_rows(backend):
    token, confidence = choose_token(torch.zeros(0, 5), temperature=1.0, top_k=2)
    assert token.shape == confidence.shape == (0,)


def test_strides(restride, backend):
    logits = torch.randn(4, 33)
    for actual, expected in zip(choose_token(restride(logits)), choose_token(logits), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("rule", RULES)
def test_rows_do_not_depend_on_their_neighbours(rule, backend):
    logits, keys = 3 * torch.randn(7, 60), torch.randint(0, 9, (7, 3))
    how = {"rule": rule, "temperature": 0.9, "top_p": 0.95}
    token, confidence = choose_token(logits, row_keys=keys, **how)
    for row in range(7):
        own, own_confidence = choose_token(logits[row : row + 1], row_keys=keys[row : row + 1], **how)
        assert own.item() == token[row]
        torch.testing.assert_close(own_confidence[0], confidence[row])


def test_default_row_keys_are_the_row_numbers(backend):
    logits = torch.zeros(50, 40)
    token, _ = choose_token(logits, temperature=1.0)
    assert torch.equal(token, choose_token(logits, temperature=1.0, row_keys=torch.arange(50)[:, None])[0])
    assert token.unique().numel() > 20


# Public reports


def test_A17_ties_go_to_the_lowest_id(backend):
    logits = torch.zeros(3, 5000, dtype=torch.bfloat16)
    logits[:, 17:] = 0.5
    for rule in RULES:
        assert choose_token(logits, rule=rule)[0].tolist() == [17, 17, 17]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_B04_nan_is_an_error_and_not_a_token(rule, how, backend):
    for bad, place in ((math.nan, 0), (INF, 0), (math.nan, 5), (INF, 5), (math.nan, 70), (INF, 70), (math.nan, ...)):
        logits = torch.randn(3, 72, dtype=torch.bfloat16)
        logits[1, place] = bad
        with pytest.raises(ValueError, match=r"^logits of row 1 hold NaN or \+inf"):
            choose_token(logits, rule=rule, banned=(5,), vocab_limit=64, **how)


def test_B04_no_candidate_is_an_error(backend):
    logits = torch.tensor([[0.0, 1.0, 2.0], [9.0, -INF, -INF]])
    with pytest.raises(ValueError, match=r"^logits of row 1 .* no id that may be chosen"):
        choose_token(logits, banned=(0,))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_B22_surplus_ids_are_never_chosen(temperature, backend):
    logits = torch.randn(20, 72)
    logits[:, 70] = 9.0
    token, confidence = choose_token(logits, temperature=temperature, vocab_limit=64)
    assert (token < 64).all()
    # They keep their share of the probability.
    torch.testing.assert_close(confidence, logits.log_softmax(-1)[torch.arange(20), token])
    assert (choose_token(logits)[0] == 70).all()


@pytest.mark.parametrize("columns", [1, 127, 256, 257, 300, 1000, 1024])
def test_winner_is_the_lowest_id_wherever_it_stands(columns, backend):
    torch.manual_seed(columns)
    for best in {0, columns // 3, columns - 1}:
        logits = torch.randn(3, columns)
        logits[0, best] = 9
        logits[1, best:] = 9  # a tie up to the end of the row
        logits[2] = 0  # and of the whole row
        token, _ = choose_token(logits)
        assert token.tolist() == [best, best, 0]


@pytest.mark.parametrize("rule", RULES)
def test_temperatures_may_be_whole_numbers(rule, backend):
    logits = torch.randn(3, 20)
    found, expected = (
        choose_token(logits, rule=rule, temperature=kind(2), confidence_temperature=kind(2)) for kind in (int, float)
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
