"""Checks and times the ways of an operation, one after the other, on this machine, and tells what they reach of it."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dkv.bench.gpu.cases import Case, running
from dkv.bench.gpu.lab import SHAPE_OF
from dkv.bench.gpu.ops import ACTIVE, BATCHES, COLUMNS, items, shares, told, values_of
from dkv.bench.gpu.report import short
from dkv.bench.machine import rates
from dkv.bench.report import fixed
from dkv.bench.shapes import shape
from dkv.bench.timing import spread, timed
from dkv.kernels.common.backend import has_triton
from dkv.models import ModelSpec

Make = Callable[[torch.device], Case]
SLOTS = {"cpu": 256, "cuda": 1024}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Of heads and vocabulary, by which a CPU's sizes are divided.
PART = 8
# Flex attention compiles for every shape; this bounds what it takes of a run.
COMPILE_SECONDS = {"cpu": 20, "cuda": 180}


def scaled(spec: ModelSpec) -> ModelSpec:
    """An eighth of the vocabulary, and as small a part of the heads as leaves a key head; heads keep their size."""
    part = math.gcd(PART, spec.num_kv_heads)
    widths = ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size")
    smaller = {name: getattr(spec, name) // part for name in widths}
    return replace(spec, vocab_size=spec.vocab_size // PART, mask_token_id=spec.mask_token_id // PART, **smaller)


def cases(kind: str) -> dict[str, Make]:
    """By name, what is benchmarked on a kind of device: the models whole on a GPU, else `scaled`."""
    specs = {family: shape(name) for family, name in SHAPE_OF.items()}
    specs = {family: spec if kind == "cuda" else scaled(spec) for family, spec in specs.items()}
    return dict(items(specs, [SLOTS[kind]], BATCHES, ACTIVE, DTYPE[kind]))


class Runner:
    """The benchmarks of one run.

    Attributes:
        device: the GPU if there is one.
        rates: of the device, in the dtype of the benchmarks.
        found: by name of the case, what `dkv.bench.gpu.ops.values_of` makes of its ways.
    """

    def __init__(self):
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.rates = rates(self.device, DTYPE[self.device.type])
        self.found: dict[str, dict[str, Any]] = {}
        self._last: tuple[str, Case] | tuple[None, None] = (None, None)
        self._compiling = 0.0

    def measure(self, benchmark: Any, name: str, make: Make, way: str) -> None:
        """Check `way`, time it with the fixture `benchmark`, and state bytes, FLOPs and shares with it.

        Skips what cannot run here, and says why.
        """
        if way == "triton" and (self.device.type != "cuda" or not has_triton()):
            pytest.skip("triton needs a GPU and the package triton")
        if way == "flex" and self._compiling > COMPILE_SECONDS[self.device.type]:
            compiled = f"flex attention has compiled for {self._compiling:.0f} s in this run"
            pytest.skip(f"{compiled}; choose fewer shapes with -k")
        try:
            case = self._case(name, make)
            self._check(case, way)
            benchmark.group = name
            call = case.call(way)
            with running(way):
                benchmark(partial(timed, call, self.device) if self.device.type == "cuda" else call)
        except torch.OutOfMemoryError as problem:
            self._last = (None, None)
            pytest.skip(f"needs more memory: {short(problem)}")
        benchmark.extra_info.update(sizes=case.sizes, bytes=case.bytes, flops=case.flops, **self.rates)
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats
            benchmark.extra_info.update(shares(case, seconds.median, self.rates))
            times = self.found.get(name, {}).get("ms", {}) | {way: spread(s * 1e3 for s in seconds.data)}
            self.found[name] = values_of(name, case, times, {}, self.rates)

    def _case(self, name: str, make: Make) -> Case:
        """Built once for all its ways; one at a time is held."""
        if self._last[0] != name:
            self._last = (None, None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            torch.manual_seed(0)
            with torch.no_grad():
                self._last = (name, make(self.device))
        return self._last[1]

    def _check(self, case: Case, way: str) -> None:
        start = time.perf_counter()
        try:
            case.check(way)
        except (AssertionError, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            if way != "flex":
                raise
            pytest.skip(f"flex attention does not run here: {short(problem)}")
        finally:
            self._compiling += time.perf_counter() - start if way == "flex" else 0

    def table(self) -> list[str]:
        """Lines for the terminal: a case each, in the columns of part `ops` of `dkv.bench.gpu`."""
        dtype = str(DTYPE[self.device.type]).removeprefix("torch.")
        subject = f"dkv (triton on a GPU, else torch); {self.device}, threads of torch: {torch.get_num_threads()}"
        head = ["ms per call, median and half the range from tenth to ninetieth percentile"]
        head += [told(self.rates, subject, dtype), fixed(COLUMNS)]
        return [*head, *(fixed(COLUMNS, values) for values in self.found.values()), *FOOTNOTE.splitlines()]


FOOTNOTE = """\
Bytes and FLOPs are those that cannot be avoided: inputs read once, outputs written once. The larger of both shares is
the share of the floor: no way that moves all data through memory is faster. More than 100 %: the data fit in the cache,
which is faster than the memory that the copy went through; the product is of a shape that suits the machine better than
a large square; or something else ran while the rates were taken. Operations on a few KB take what their calls cost,
launch and wait included, and reach next to nothing of the floor."""
