"""What the checks of `dkv.bench.gpu` share: the list of checks, comparisons, and inputs.

A check is a function of a device that raises AssertionError, so that it runs without pytest. It calls the public
operations; whoever runs it has chosen the backend.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dkv.kernels.choose import reference

Check = Callable[[torch.device], None]
CHECKS: dict[str, Check] = {}

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
RULES = ("query_lengths", "key_ranges", "key_mask", "mask", "block_ids")


class Skipped(Exception):
    """A check that this machine cannot make, and why."""


def check(function: Check) -> Check:
    """Put a function on the list of checks, under its own name."""
    CHECKS[function.__name__] = function
    return function


def check_each(name: str, values: Sequence[Any]) -> Callable[[Callable], Callable]:
    """Put a function (device, value) on the list once for every value, as "name_value"."""

    def enlist(function: Callable) -> Callable:
        for value in values:
            label = str(value).removeprefix("torch.")
            CHECKS[f"{name}_{label}"] = lambda device, value=value: function(device, value)
        return function

    return enlist


def thin(device: torch.device, cases: Sequence[Any], every: int = 5) -> Sequence[Any]:
    """All cases on a GPU; elsewhere, where the kernels are interpreted, one in so many."""
    return cases if device.type == "cuda" else cases[::every]


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("needs a GPU")


def need_memory(device: torch.device, gigabytes: float) -> None:
    need_gpu(device)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] / 1e9
    if free < gigabytes:
        raise Skipped(f"needs {gigabytes:g} GB of free memory, there are {free:.1f}")


def close(actual: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    """`actual` is off by no more than 4 times what plain torch is off, and a few roundings.

    Args:
        exact: the answer in float64.
        plain: the same computed in plain torch, at the dtype that the operation promises.
    """
    actual, plain, exact = (x.detach().to("cpu", torch.float64) for x in (actual, plain, exact))
    if exact.numel() == 0:
        return
    finite = exact[exact.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    off = torch.where(plain == exact, 0, (plain - exact).abs()).nan_to_num(0, 0, 0).max().item()
    error = torch.where(actual == exact, 0, (actual - exact).abs())
    bound = 4 * off + 8 * torch.finfo(torch.float32).eps * size
    assert bool((error <= bound).all()), f"{what}: off by {error.max().item():.3g}, allowed {bound:.3g}"


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal bits, NaN included."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    differ = (actual != expected) & ~((actual != actual) & (expected != expected))
    if bool(differ.any()):
        place = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} values differ, first at {place}: "
            f"{actual[place].item()}, expected {expected[place].item()}"
        )


def raises(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], what: str) -> str:
    """The message of the error that `call` must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what}: no error")


def randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(shape).to(device, dtype)


def distinct(device: torch.device, rows: int, count: int, size: int) -> Tensor:
    """int64 [rows, count] ascending, each row without repetitions, in 0..size-1."""
    return torch.rand(rows, size).argsort(1)[:, :count].sort(1).values.to(device)


def rules(device: torch.device, b: int, n: int, s: int, names: Sequence[str], integer=torch.int64) -> dict[str, Any]:
    """Arguments that say who sees what; the last row of a batch is hidden wherever a rule can hide a row."""
    stop = torch.randint(1, s + 1, (b,))
    start = torch.randint(0, s, (b,)).minimum(stop)
    every = {
        "query_lengths": torch.randint(1, n + 1, (b,)).to(integer),
        "key_ranges": torch.stack([start, stop], 1).to(integer),
        "key_mask": torch.rand(b, s) < 0.6,
        "mask": torch.rand(b, n, s) < 0.6,
    }
    blocks = (torch.randint(0, 4, (b, n)).to(integer), torch.randint(0, 5, (b, s)).to(integer))
    if b > 1:
        every["query_lengths"][-1] = 0
        every["key_ranges"][-1] = s // 2
        every["key_mask"][-1] = every["mask"][-1] = False
    found = {name: every[name].to(device) for name in names if name != "block_ids"}
    return found | ({"block_ids": tuple(x.to(device) for x in blocks)} if "block_ids" in names else {})


def visible(q: Tensor, k: Tensor, given: dict[str, Any]) -> Tensor | None:
    """bool [B, N or 1, S] of what `rules` gave; None: everything."""
    names = ("query_lengths", "key_ranges", "key_mask", "mask", "block_ids")
    return reference.visibility(q, k, *(given.get(name) for name in names))


def surrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a slice of a larger tensor of NaN (integers: of nonsense), and that tensor."""
    nonsense = {torch.bool: True, torch.int32: 2**30, torch.int64: 2**40}.get(x.dtype, torch.nan)
    around = torch.full([size + 2 for size in x.shape], nonsense, dtype=x.dtype, device=x.device)
    inner = around[tuple(slice(1, size + 1) for size in x.shape)]
    inner.copy_(x)
    return inner, around
