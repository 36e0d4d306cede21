"""One operation on given inputs: the ways to compute it, its bytes and FLOPs, and the check that the ways agree.

What is right is the eager definition of an operation, backend "reference", on the same inputs in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dkv import kernels
from dkv.models import ModelSpec

OURS = ("torch", "triton")
# By name: a tensor, a pair of them or of a tensor and a number.
Inputs = dict[str, Any]


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs, every tensor of them changed."""
    return tree_map_only(Tensor, change, inputs)


@dataclass(frozen=True)
class Case:
    """One operation on given inputs.

    Attributes:
        name: of the operation.
        sizes: as the operation names them.
        inputs: of `run`.
        run: the public operation; inputs -> what it returns.
        tolerance: how far a result may be off, as a share of the largest value.
        bytes, flops: that cannot be avoided: every input read and every output written once.
        others: further ways to compute it from the inputs; "flex" compiles when it is first called.
        eager_tolerance: of the eager way, where it rounds more often.
        written: names of the inputs that a call writes.
        judged: inputs and what a call returned -> what has to agree.
    """

    name: str
    sizes: dict[str, int]
    inputs: Inputs
    run: Callable[[Inputs], Any]
    tolerance: float = 0.0
    bytes: int = 0
    flops: int = 0
    others: dict[str, Callable[[Inputs], Any]] = field(default_factory=dict)
    eager_tolerance: float | None = None
    written: tuple[str, ...] = ()
    judged: Callable[[Inputs, Any], Any] | None = None

    def __str__(self) -> str:
        kinds = {str(x.dtype).removeprefix("torch.") for x in self.inputs.values() if isinstance(x, Tensor)}
        return f"{self.name} {' '.join(f'{name}{size}' for name, size in self.sizes.items())} {' '.join(sorted(kinds))}"

    def call(self, way: str) -> Callable[[], Any]:
        """What is timed; to be run inside `running`."""
        return partial(self.others.get(way, self.run), self.inputs)

    def run_by(self, way: str) -> Any:
        with running(way):
            return self.call(way)()

    def results(self, way: str, inputs: Inputs | None = None) -> tuple[Tensor, ...]:
        """What a way gives on a copy of the inputs, the tensors that it writes among it."""
        inputs = dict(self.inputs if inputs is None else inputs)
        inputs |= {name: inputs[name].clone() for name in self.written}
        with running(way):
            found = self.others.get(way, self.run)(inputs)
        if self.judged is not None:
            found = self.judged(inputs, found)
        if isinstance(found, Tensor):
            found = (found, *(inputs[name] for name in self.written))
        return tuple(found)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        return self.results("reference", mapped(self.inputs, lambda x: x.double() if x.is_floating_point() else x))

    def check(self, way: str) -> None:
        """Raise AssertionError unless a way does what the definition of the operation does."""
        rounded = way == "eager" and self.eager_tolerance is not None
        allowed = self.eager_tolerance if rounded else self.tolerance
        for i, (actual, expected) in enumerate(zip(self.results(way), self.expected, strict=True)):
            assert actual.shape == expected.shape, f"{self}, {way}: result {i} has shape {list(actual.shape)}"
            off = error(actual, expected)
            assert off <= allowed, f"{self}, {way}: result {i} is off by {off:.2g}, allowed {allowed:.2g}"


@contextmanager
def running(way: str) -> Iterator[None]:
    """What a way needs around its calls, so that it is not timed with them."""
    # The others call no operation of dkv.
    with torch.no_grad(), kernels.use_backend(way if way in OURS else "reference"):
        yield


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error as a share of the largest value; of integers the share that differs."""
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return (actual != expected).double().mean().item()
    actual, expected = actual.double(), expected.double()
    finite = expected[expected.isfinite()].abs()
    size = finite.max().clamp_min(torch.finfo(torch.float32).tiny) if finite.numel() else 1.0
    # Infinite where it should be is right; NaN is larger than any bound.
    off = torch.where(actual == expected, 0, (actual - expected).abs() / size)
    return off.nan_to_num(torch.inf).max().item()


def tolerance(dtype: torch.dtype, roundings: int, sums: int = 16) -> float:
    """How far a result may be off: sums in float32 in another order, and so many roundings to `dtype`."""
    return sums * torch.finfo(torch.float32).eps + roundings * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Sizes:
    """B rows of S slots, N of them active."""

    spec: ModelSpec
    batch: int
    slots: int
    active: int
    dtype: torch.dtype


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; small tensors have the same on every device."""
    where = device if torch.Size(shape).numel() > 1 << 20 else "cpu"
    return torch.randn(shape, device=where).to(device, dtype)


def distinct(device: torch.device, rows: int, count: int, size: int) -> Tensor:
    """int64 [rows, count] ascending, each row without repetitions, in 0..size-1."""
    return torch.rand(rows, size).argsort(1)[:, :count].sort(1).values.to(device)


def heads(z: Sizes, device: torch.device, *slots: int) -> tuple[Tensor, ...]:
    """Queries of the first number of slots, keys and values of the others."""
    counts = (z.spec.num_heads, z.spec.num_kv_heads, z.spec.num_kv_heads)
    pairs = zip(slots, counts, strict=True)
    return tuple(randn(device, z.batch, n, h, z.spec.head_dim, dtype=z.dtype) for n, h in pairs)


def counts(z: Sizes, device: torch.device, most: int) -> tuple[Tensor, Tensor]:
    """Of rows of different lengths, between half of `most` and all: these, int64 [B], and what is of a row, [B, most].

    A single row has all.
    """
    found = [most - most // 2 * i // max(z.batch - 1, 1) for i in range(z.batch)]
    lengths = torch.tensor(found, device=device)
    return lengths, torch.arange(most, device=device) < lengths[:, None]
