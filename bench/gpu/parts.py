"""What each part of `dkv.bench.gpu` does."""

from collections.abc import Callable

from dkv.bench.gpu import autotune, checks, ops, profile, steps
from dkv.bench.gpu.lab import Lab
from dkv.bench.gpu.report import Report

RUN: dict[str, Callable[[Report, Lab], None]] = {
    "profile": profile.run,
    "steps": steps.run,
    "checks": checks.run,
    "autotune": autotune.run,
    "ops": ops.run,
    "more": steps.run_more,
}
