"""The arguments of rope_scatter_: what is refused, and by which words."""

import pytest
import torch
from torch import Tensor

from dkv.kernels import rope_scatter_


def inputs(b: int = 2, n: int = 3, s: int = 5, hq: int = 4, hkv: int = 2, d: int = 16) -> dict[str, Tensor]:
    return {
        "q": torch.randn(b, n, hq, d),
        "k": torch.randn(b, n, hkv, d),
        "v": torch.randn(b, n, hkv, d),
        "cos": torch.randn(s + 3, d // 2),
        "sin": torch.randn(s + 3, d // 2),
        "positions": torch.stack([torch.randperm(s)[:n] for _ in range(b)]),
        "k_buf": torch.randn(b, s, hkv, d),
        "v_buf": torch.randn(b, s, hkv, d),
    }


@pytest.mark.parametrize("place", [-1, 11, 12])
def test_A19_positions_outside(place, backend):
    args = inputs(n=5, s=11)
    args["positions"][1, 2] = place
    before = args["k_buf"].clone()
    with pytest.raises(IndexError, match=rf"^positions must be in 0\.\.10, got {place}$"):
        rope_scatter_(**args)
    assert torch.equal(args["k_buf"], before)


@pytest.mark.parametrize("place", [-1, 14])
def test_A19_query_positions_outside(place, backend):
    args, query_positions = inputs(n=5, s=11), torch.randint(0, 14, (2, 5))
    query_positions[0, 1] = place
    with pytest.raises(IndexError, match=rf"^query_positions must be in 0\.\.13, got {place}$"):
        rope_scatter_(**args, query_positions=query_positions)


def test_A19_tables_shorter_than_the_buffer(backend):
    args = inputs(n=5, s=11)
    args["cos"], args["sin"] = args["cos"][:7], args["sin"][:7]
    args["positions"][0, 0] = 7
    with pytest.raises(IndexError, match=r"^positions must be in 0\.\.6"):
        rope_scatter_(**args)


def call(**changes):
    args = inputs() | changes
    return rope_scatter_(**args)


def zeros(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(2, 3, 16)}, r"^q must have shape"),
        ({"q": zeros(2, 3, 4, 15)}, r"^q must have an even head size, got 15"),
        ({"q": zeros(2, 3, 4, 16, dtype=torch.int64)}, r"^q must be float16"),
        ({"q": zeros(2, 2, 4, 16)}, r"^q has 2 entries and k has 3: give query_positions"),
        ({"k": zeros(2, 3, 2, 14)}, r"^k must have shape"),
        ({"k": zeros(2, 3, 2, 16, dtype=torch.float16)}, r"^k is torch.float16 but q is torch.float32"),
        ({"v": zeros(2, 3, 1, 16)}, r"^v must have shape"),
        ({"v": zeros(2, 3, 2, 16, dtype=torch.float16)}, r"^v is torch.float16 but q"),
        ({"cos": zeros(8, 16)}, r"^cos must have shape \[any, 1 to 8\]"),
        ({"cos": zeros(8, 0)}, r"^cos must have shape \[any, 1 to 8\], half of a head at most, got \[8, 0\]"),
        ({"cos": zeros(8, 4)}, r"^sin must have shape \[8, 4\], got \[8, 8\]"),
        ({"sin": zeros(7, 8)}, r"^sin must have shape \[8, 8\]"),
        ({"positions": zeros(2, 4, dtype=torch.int64)}, r"^positions must have shape"),
        ({"positions": zeros(2, 3)}, r"^positions must be int32, int64"),
        ({"k_buf": zeros(2, 5, 1, 16)}, r"^k_buf must have shape"),
        ({"v_buf": zeros(2, 6, 2, 16)}, r"^v_buf must have shape"),
        ({"query_positions": zeros(2, 4, dtype=torch.int64)}, r"^query_positions must have shape"),
        ({"query_positions": zeros(2, 3)}, r"^query_positions must be int32"),
        ({"q_norm": (zeros(8), 1e-6)}, r"^q_norm\[0\] must have shape"),
        ({"k_norm": (zeros(8), 1e-6)}, r"^k_norm\[0\] must have shape"),
        ({"k_norm": (zeros(16, device="meta"), 1e-6)}, r"^k_norm\[0\] is on meta but q is on cpu"),
    ],
)
def test_arguments_are_checked(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("name", ["k", "v", "cos", "sin", "positions", "k_buf", "v_buf", "query_positions"])
def test_A14_two_devices(name):
    args = inputs() | {"query_positions": torch.randint(0, 8, (2, 3))}
    with pytest.raises(ValueError, match=f"^{name} is on meta but q is on cpu"):
        rope_scatter_(**args | {name: args[name].to("meta")})
