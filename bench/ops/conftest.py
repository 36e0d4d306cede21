"""Fixture and summary of the micro-benchmarks; `bench/ops/__init__.py` says how to run them."""

import shlex
import sys

import pytest

from dkv.bench.machine import facts
from dkv.bench.ops.runner import Runner

RUNNER = pytest.StashKey[Runner]()


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest) -> Runner:
    return request.config.stash.setdefault(RUNNER, Runner())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    if RUNNER in config.stash:
        machine_info["dkv"] = facts(config.stash[RUNNER].device, shlex.join(["pytest", *sys.argv[1:]]))


# After the tables of pytest-benchmark.
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if RUNNER in config.stash and config.stash[RUNNER].found:
        terminalreporter.section("share of what the machine reaches")
        for line in config.stash[RUNNER].table():
            terminalreporter.write_line(line)
