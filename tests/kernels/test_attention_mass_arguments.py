"""The arguments of attention_mass: rows beside others, forms that they may come in, and what is refused."""

from functools import partial

import pytest
import torch

from dkv.kernels import attention_mass, use_backend
from tests.kernels.test_attention_mass import SHAPES, check, given, numbers


def test_a_row_does_not_depend_on_its_neighbours(backend):
    args = given(SHAPES[5], True)
    alone = {name: x[1:2] if name.startswith(("query", "key", "k_")) else x for name, x in args.items()}
    assert torch.equal(attention_mass(**alone)[0], attention_mass(**args)[1])
    assert torch.equal(attention_mass(**args), attention_mass(**args))


def test_A10_int32_and_int64_give_the_same(backend):
    args = given(SHAPES[1], True)
    narrow = {name: x.int() if x.dtype == torch.int64 else x for name, x in args.items()}
    assert torch.equal(attention_mass(**narrow), attention_mass(**args))


def test_A07_strides(restride, backend):
    args = given(SHAPES[1], True)
    strided = {name: restride(args[name]) for name in ("q", "k_buf", "lse")}
    strided |= {name: torch.stack([args[name]] * 2, 1)[:, 0] for name in ("weight", "query_starts", "query_lengths")}
    strided["key_ranges"] = torch.stack([args["key_ranges"]] * 2, -1)[..., 0]
    torch.testing.assert_close(attention_mass(**strided), attention_mass(**args))


def test_ranges_past_the_ends_and_backwards(backend):
    args = given(((3, 2, 4), 0, 0, 9, 2, 1, 16))
    expected = attention_mass(**args)
    args["key_ranges"] = torch.tensor([[-3, 40], [7, 2], [0, 9]])
    found = attention_mass(**args)
    assert torch.equal(found[::2], expected[::2]) and (found[1] == 0).all()


def test_a_batch_without_entries_or_rows_or_slots(backend):
    for shape in (((0, 0), 0, 0, 5, 2, 1, 16), ((), 0, 3, 5, 2, 1, 16), ((), 0, 0, 5, 2, 1, 16)):
        assert (check(given(shape)) == 0).all()
    assert attention_mass(**given(((2, 1), 0, 2, 0, 2, 1, 16))).shape == (2, 0)


def test_inputs_are_left_alone(backend):
    args = given(SHAPES[1], True)
    before = {name: x.clone() for name, x in args.items()}
    attention_mass(**args)
    for name, x in args.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)


def test_nothing_is_read_back(no_readback, monkeypatch):
    args = given(SHAPES[1], True)
    monkeypatch.setattr("dkv.kernels.common.operation.readable", lambda _: False)
    with use_backend("torch"), no_readback():
        attention_mass(**args, most_queries=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": numbers(2, 3, 4, 16)}, r"^q must have shape"),
        ({"q": numbers(5, 3, 16)}, r"^q has 3 heads.* 2 heads of k_buf"),
        ({"q": numbers(5, 0, 16)}, r"^q has 0 heads"),
        ({"q": numbers(5, 4, 0)}, r"^q must have a head size of at least 1"),
        ({"q": numbers(5, 4, 16).long()}, r"^q must be float16"),
        ({"k_buf": numbers(2, 9, 2, 8)}, r"^k_buf must have shape"),
        ({"k_buf": numbers(2, 9, 2, 16).half()}, r"^k_buf is torch.float16 but q is torch.float32"),
        ({"lse": numbers(5, 2)}, r"^lse must have shape \[5, 4\]"),
        ({"lse": numbers(5, 4).double()}, r"^lse must be float32"),
        ({"weight": numbers(4)}, r"^weight must have shape \[5\]"),
        ({"weight": numbers(5).half()}, r"^weight must be float32"),
        ({"query_starts": torch.zeros(3).long()}, r"^query_starts must have shape \[2\]"),
        ({"query_lengths": torch.zeros(2)}, r"^query_lengths must be int32, int64"),
        ({"key_ranges": torch.zeros(2).long()}, r"^key_ranges must have shape \[2, 2\]"),
        ({"most_queries": -1}, r"^most_queries must be at least 0, got -1"),
        ({"lse": torch.zeros(5, 4, device="meta")}, r"^lse is on meta but q is on cpu"),
    ],
)
def test_arguments_are_checked(changes, message):
    args = given(((2, 3), 0, 0, 9, 4, 2, 16))
    call = partial(attention_mass, **(args | changes))
    with pytest.raises(ValueError, match=message):
        call()
