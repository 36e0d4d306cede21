"""Fixture and summary of the micro-benchmarks; `bench/ops/__init__.py` says how to run them."""

import shlex
import sys
from collections.abc import Callable
from functools import partial

import pytest

from dkv.bench.machine import facts
from dkv.bench.ops.runner import Runner

RUNNER = pytest.StashKey[Runner]()


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`Runner.measure` of this run with the fixture `benchmark` of this test."""
    stash = request.config.stash
    if RUNNER not in stash:
        stash[RUNNER] = Runner()
    return partial(stash[RUNNER].measure, benchmark)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    if RUNNER in config.stash:
        machine_info["dkv"] = facts(config.stash[RUNNER].device, shlex.join(["pytest", *sys.argv[1:]]))


# After the tables of pytest-benchmark.
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    runner = config.stash.get(RUNNER, None)
    if runner is not None and runner.found:
        terminalreporter.section("share of what the machine reaches")
        for line in runner.table():
            terminalreporter.write_line(line)
