"""Checks and times the ways of an operation, one after the other, on the device of this machine."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dkv.bench.gpu.cases import Case, running
from dkv.bench.gpu.operations import OPERATIONS
from dkv.bench.gpu.report import short
from dkv.bench.machine import rates
from dkv.bench.ops.report import floor_seconds, timed
from dkv.bench.ops.sizes import DTYPE, sizes, title
from dkv.bench.timing import synchronise
from dkv.kernels.common.backend import has_triton

# Flex attention compiles for every shape; this bounds what it takes of a run.
COMPILE_SECONDS = {"cpu": 20, "cuda": 180}


class Runner:
    """The benchmarks of one run.

    Attributes:
        device: the GPU if there is one.
        rows: what every benchmark states, in the order they ran.
        rates: of the device, in the dtype of the benchmarks.
    """

    def __init__(self):
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.dtype = DTYPE[self.device.type]
        self.rates = rates(self.device, self.dtype)
        self.rows: list[dict[str, Any]] = []
        self._last: tuple[tuple[str, str] | None, Case | None] = (None, None)
        self._compiling = 0.0

    def measure(self, benchmark: Any, operation: str, step: str, way: str) -> None:
        """Check `way`, time it with the fixture `benchmark`, and state bytes, FLOPs and floor with it.

        Skips what cannot run here, and says why.
        """
        reason = self._missing(way)
        if reason:
            pytest.skip(reason)
        try:
            case = self._case(operation, step)
            self._check(case, way)
            row = self._row(case, step, way)
            benchmark.group = f"{row['operation']} {row['shape']}"
            benchmark.extra_info.update(row)
            with running(way):
                benchmark(self._synchronised(case.call(way)))
        except torch.OutOfMemoryError as problem:
            self._last = (None, None)
            pytest.skip(f"needs more memory: {short(problem)}")
        if benchmark.stats is not None:
            median = benchmark.stats.stats.median
            eager = median if way == "eager" else self._eager(row["shape"], operation)
            benchmark.extra_info.update(timed(row, median, eager))
        self.rows.append(dict(benchmark.extra_info))

    def _missing(self, way: str) -> str | None:
        """Why a way cannot run here."""
        if way == "triton" and (self.device.type != "cuda" or not has_triton()):
            return "triton needs a GPU and the package triton"
        if way == "flex" and self._compiling > COMPILE_SECONDS[self.device.type]:
            return f"flex attention has compiled for {self._compiling:.0f} s in this run; choose fewer shapes with -k"
        return None

    def _case(self, operation: str, step: str) -> Case:
        """Built once for all ways of a step; one at a time is held."""
        if self._last[0] != (operation, step):
            self._last = (None, None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            torch.manual_seed(0)
            with torch.no_grad():
                self._last = ((operation, step), OPERATIONS[operation](sizes(step, self.device), self.device))
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

    def _row(self, case: Case, step: str, way: str) -> dict[str, Any]:
        numbers = " ".join(f"{name}{size}" for name, size in case.sizes.items())
        row = {"operation": case.name, "shape": f"{title(step, self.device)} {numbers}", "way": way}
        row |= {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        row |= {"threads": torch.get_num_threads(), "sizes": case.sizes, "bytes": case.bytes, "flops": case.flops}
        return row | self.rates | {"floor_seconds": floor_seconds(case.bytes, case.flops, self.rates)}

    def _eager(self, shape: str, operation: str) -> float | None:
        for row in self.rows:
            if (row["operation"], row["shape"], row["way"]) == (operation, shape, "eager"):
                return row.get("median_seconds")
        return None

    def _synchronised(self, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            call()
            synchronise(self.device)

        return run if self.device.type == "cuda" else call
