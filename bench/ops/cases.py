"""One operation at one step of a model: its inputs, the ways to compute it, and the check that they agree."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor

from dkv import kernels
from dkv.bench.gpu_work import ACTIVE, BATCHES, SHAPE_OF, TITLES, Sizes, Work
from dkv.bench.shapes import shape
from dkv.models import ModelSpec

# Name -> family, whether all slots are computed, rows.
STEPS = {
    f"{family}-{kind}-b{batch}": (family, kind == "full", batch)
    for family in SHAPE_OF
    for kind in ("full", "cached")
    for batch in BATCHES
}
CACHED_STEPS = [name for name, (_, full, _) in STEPS.items() if not full]
OURS = ("torch", "triton")
SLOTS = {"cpu": 256, "cuda": 1024}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Of heads and vocabulary, by which a CPU's sizes are divided.
PART = 8


def scaled(spec: ModelSpec) -> ModelSpec:
    """An eighth of the vocabulary, and as small a part of the heads as leaves a key head; heads keep their size."""
    part = math.gcd(PART, spec.num_kv_heads)
    return replace(
        spec, vocab_size=spec.vocab_size // PART, mask_token_id=spec.mask_token_id // PART,
        hidden_size=spec.hidden_size // part, num_heads=spec.num_heads // part,
        num_kv_heads=spec.num_kv_heads // part, intermediate_size=spec.intermediate_size // part,
    )  # fmt: skip


def sizes(step: str, device: torch.device) -> Sizes:
    """What a step named in `STEPS` computes on a device: the model whole on a GPU, else `scaled`."""
    family, full, batch = STEPS[step]
    spec, slots = shape(SHAPE_OF[family]), SLOTS[device.type]
    spec = spec if device.type == "cuda" else scaled(spec)
    return Sizes(spec, batch, slots, slots if full else ACTIVE, DTYPE[device.type])


def title(step: str, device: torch.device) -> str:
    """Model and step, such as "LLaDA-8B scaled cached"."""
    family, full, _ = STEPS[step]
    part = "" if device.type == "cuda" else " scaled"
    return f"{TITLES[family]}{part} {'full' if full else 'cached'}"


def each(ways: tuple[str, ...], steps=tuple(STEPS)) -> Callable[[Callable], Callable]:
    """Mark a benchmark to run once for every step and way, all ways of a step in a row."""

    def mark(test: Callable) -> Callable:
        return pytest.mark.parametrize("way", ways)(pytest.mark.parametrize("step", steps)(test))

    return mark


def tolerance(dtype: torch.dtype, roundings: int) -> float:
    """How far a row may be off: sums in float32 in another order, and so many roundings to `dtype`."""
    return 16 * torch.finfo(torch.float32).eps + roundings * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Case:
    """One operation on given inputs.

    Attributes:
        work: inputs, calls, bytes and FLOPs.
        sizes: as the operation names them.
        answer: way and what its call returned -> the tensors that all ways must agree on.
        tolerance: bound of the error of a row (last dimension), as a share of its length.
        eager: in place of the eager call of `work`.
        eager_tolerance: of the eager way, where it rounds more often.
        in_place: names of the inputs that calls write.
        written: these as they were at first.
    """

    work: Work
    sizes: dict[str, int]
    answer: Callable[[str, object], tuple[Tensor, ...]]
    tolerance: float = 0.0
    eager: Callable[[], object] | None = None
    eager_tolerance: float | None = None
    in_place: tuple[str, ...] = ()
    written: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "written", {name: self.work.inputs[name].clone() for name in self.in_place})

    def call(self, way: str) -> Callable[[], object]:
        """What is timed; run it inside `running`."""
        if way == "eager" and self.eager is not None:
            return self.eager
        return self.work.others.get(way, self.work.ours)

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        return self.answers("reference")

    def answers(self, way: str) -> tuple[Tensor, ...]:
        """Of one call on inputs as they were at first."""
        for name, start in self.written.items():
            self.work.inputs[name].copy_(start)
        with running(way):
            return tuple(x.clone() for x in self.answer(way, self.call(way)()))

    def check(self, way: str) -> None:
        """Raise AssertionError unless a way does what the definition of the operation does."""
        answers, allowed = self.answers(way), self.tolerance
        if way == "eager" and self.eager_tolerance is not None:
            allowed = self.eager_tolerance
        assert len(answers) == len(self.expected)
        for i, (actual, expected) in enumerate(zip(answers, self.expected, strict=True)):
            assert actual.shape == expected.shape, f"{way}: result {i} has shape {list(actual.shape)}"
            off = error(actual, expected)
            assert off <= allowed, f"{way}: result {i} is off by {off:.2g}, allowed {allowed:.2g}"


@contextmanager
def running(way: str) -> Iterator[None]:
    """What a way needs around its calls, so that it is not timed with them."""
    # The others call no operation of dkv.
    with torch.no_grad(), kernels.use_backend(way if way in OURS else "reference"):
        yield


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a row, as a share of its length; of integers the share that differs."""
    if not expected.is_floating_point():
        return (actual != expected).double().mean().item()
    wide = expected.double()
    off, size = (actual.double() - wide).norm(dim=-1), wide.norm(dim=-1)
    share = (off / size.clamp_min(torch.finfo(torch.float32).tiny)).max().item()
    return math.inf if math.isnan(share) else share
