"""What the checks share: their list, the cases that they are made of, and how results are compared.

A check is a function of a device and of whether its cases are to be few, as in an interpreter. It raises AssertionError
where something is wrong, so that it runs with pytest and without.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dkv.bench.gpu import change, linear, packed, state
from dkv.bench.gpu import operations as table
from dkv.bench.gpu.cases import Case, Sizes
from dkv.bench.shapes import shape, tiny
from dkv.kernels.common.backend import chosen

Check = Callable[[torch.device, bool], None]
CHECKS: dict[str, Check] = {}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TINY = tiny(shape("llada-8b"))


class Skipped(Exception):
    """A check that this machine cannot make, and why."""


def check(*values: Any) -> Callable[[Callable], Callable]:
    """Put a function (device, few) on the list, or (device, few, value) once for every value, as "name_value"."""

    def enlist(function: Callable) -> Callable:
        for value in values:
            label = str(value).removeprefix("torch.")
            CHECKS[f"{function.__name__}_{label}"] = lambda device, few, value=value: function(device, few, value)
        if not values:
            CHECKS[function.__name__] = function
        return function

    return enlist


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """A variable of the environment inside the `with` block."""
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if old is None else os.environ.update({name: old})


def thin(few: bool, cases: Sequence[Any], every: int = 5) -> Sequence[Any]:
    """All cases, or one in so many."""
    return cases[::every] if few else cases


def agree(*cases: Case) -> None:
    """The backend in use does what the definitions of the operations do."""
    for case in cases:
        case.check(chosen() or "torch")


def small(dtype: torch.dtype, b: int, n: int, s: int, kv_heads: int = 2, group: int = 2, head_dim: int = 64) -> Sizes:
    """Of a small model with these heads; its rotary tables are float32."""
    spec = replace(TINY, num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim)
    return Sizes(spec, b, s, n, dtype)


def every_operation(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Case]:
    """A small case of each operation, with drawn tokens, ragged rows and several tokens a row."""
    z, keys = small(dtype, 2, 6, 40), torch.arange(12, device=device)[:, None]
    logits = replace(z, spec=replace(z.spec, vocab_size=1503))
    return [
        table.rope_scatter(z, device),
        table.attention(z, device, ragged=True),
        table.mass(z, device),
        packed.rope_scatter(z, device),
        packed.attention(z, device),
        table.choose(logits, device, rule="margin"),
        table.choose(logits, device, drawn=True, row_keys=keys),
        table.choose_fused(logits, device, bias=True),
        table.commit(z, device, torch.tensor([2, 4], device=device)),
        table.norm(z, device),
        table.gate(z, device),
        linear.linear8(z, device),
        linear.linear4(z, device),
        table.choose_fused(logits, device, eight=True),
        change.change(z, device),
        change.keep(z, device),
        state.plan(z, device, "window", shifted=True),
        state.pack(z, device, shifted=True),
        state.window(z, device),
        state.advance(z, device, "threshold", ends=(1, 2)),
    ]


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal bits, NaN included."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    differ = (actual != expected) & ~((actual != actual) & (expected != expected))
    if bool(differ.any()):
        at = tuple(differ.nonzero()[0].tolist())
        count = f"{int(differ.sum())} of {differ.numel()} values differ"
        raise AssertionError(f"{what}: {count}, first at {at}: {actual[at].item()}, expected {expected[at].item()}")


def equal(found: Any, expected: Any, what: str) -> None:
    """What two calls returned has equal bits."""
    for i, (a, b) in enumerate(zip(tree_leaves(found), tree_leaves(expected), strict=True)):
        same(a, b, f"{what} {i}")


def need_gpu(device: torch.device, gigabytes: float = 0.0, devices: int = 1) -> None:
    """Skip the check unless there are so many GPUs, and so much free memory."""
    if device.type != "cuda":
        raise Skipped("needs a GPU")
    if torch.cuda.device_count() < devices:
        raise Skipped("needs two devices")
    torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info(device)[0] / 1e9) < gigabytes:
        raise Skipped(f"needs {gigabytes:g} GB of free memory, there are {free:.1f}")
