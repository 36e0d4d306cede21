"""The choice from a vocabulary in parts is that from the whole, and the same to the last bit in every part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dkv.kernels import choose_token, choose_token_fused, use_backend
from dkv.kernels.choose import part
from dkv.kernels.choose import torch as torch_choice
from dkv.models.shards import Head
from tests.together import together

INF, NAN = float("inf"), float("nan")


def chosen(logits, count, **how):
    """From each of `count` parts: token, confidence and entropy, of logits that the head hands on."""
    head = nn.Linear(logits.shape[1], logits.shape[1], bias=False, device="meta")
    head.weight = nn.Parameter(torch.eye(logits.shape[1], dtype=logits.dtype))

    def of(ranks):
        own = Head(head, ranks)
        # Infinite logits would be NaN times zero.
        own.strips = lambda hidden: hidden[:, own.own].clone().split(torch_choice.STRIP, 1)
        if how.get("confidence_dtype") == "model":
            own.forward = lambda hidden: hidden.clone()
        else:
            own.forward = None
        with torch.no_grad():
            return choose_token_fused(logits, own, return_entropy=True, validate=False, **how)

    return together(count, of)


@st.composite
def cases(draw):
    rows, columns, count = draw(st.integers(0, 4)), draw(st.integers(5, 40)), draw(st.integers(1, 5))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = torch.randn(rows, columns, generator=noise, dtype=torch.float64) * draw(st.sampled_from([0.1, 3, 60]))
    if draw(st.booleans()):
        logits = logits.round()  # many are equal
    how = {"rule": draw(st.sampled_from(["probability", "margin", "entropy"]))}
    how["temperature"] = draw(st.sampled_from([0.0, 0.0, 0.7]))
    how["confidence_temperature"] = draw(st.sampled_from([1.0, 0.3]))
    how["vocab_limit"] = draw(st.none() | st.integers(3, columns))
    how["banned"] = draw(st.lists(st.integers(0, columns - 1), max_size=2, unique=True))
    how |= draw(st.sampled_from([{}, {}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}]))
    how["row_keys"] = torch.arange(rows)[:, None] + 7 if how["temperature"] else None
    spoilt = draw(st.none() | st.sampled_from([INF, -INF, NAN]))
    if rows and spoilt is not None:
        logits[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = spoilt
    return logits, count, how


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([torch.float64, torch.float32]), st.sampled_from([4, 8192]), st.sampled_from([1, 64]))
def test_parts_choose_as_the_whole(case, dtype, strip, few):
    logits, count, how = case
    logits = logits.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_choice, "STRIP", strip)
        patch.setattr(part, "FEW", few)
        found = chosen(logits, count, **how)
    for other in found[1:]:
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(found[0], other, strict=True))
    with use_backend("reference"):
        token, *numbers = choose_token(logits, return_entropy=True, validate=False, **how)
    real = ~numbers[0].isnan()
    assert torch.equal(found[0][0][real], token[real])
    close = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    for mine, right in zip(found[0][1:], numbers, strict=True):
        torch.testing.assert_close(mine, right, equal_nan=True, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_confidences_of_the_dtype_of_the_model_in_parts(dtype):
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = choose_token(logits, confidence_dtype="model", return_entropy=True)
    for found in chosen(logits, 3, confidence_dtype="model"):
        assert all(torch.equal(x, y) for x, y in zip(found, whole, strict=True))


def test_the_same_tokens_are_drawn_however_many_parts_there_are():
    logits = torch.zeros(64, 30, dtype=torch.float64)
    keys = torch.arange(64)[:, None]
    draws = [chosen(logits, count, temperature=1.0, row_keys=keys)[0][0] for count in (1, 2, 3, 5)]
    assert all(torch.equal(draws[0], other) for other in draws) and len(draws[0].unique()) > 15


@pytest.mark.parametrize(("how", "most"), [({}, 8), ({"top_k": 5}, 64), ({"top_p": 0.01}, 64)])
def test_what_is_exchanged_does_not_grow_with_the_vocabulary(how, most):
    def told(ranks, columns):
        own = Head(nn.Linear(4, columns, bias=False), ranks)
        sizes, own.gathered = [], lambda x: sizes.append(x.numel()) or ranks.gathered(x)
        with torch.no_grad():
            choose_token_fused(torch.ones(6, 4), own, return_entropy=True, rule="margin", **how)
        return sizes

    sizes = [together(2, lambda ranks, n=columns: told(ranks, n)) for columns in (500, 5000)]
    assert sizes[0] == sizes[1] and max(sizes[0][0]) <= 6 * most
