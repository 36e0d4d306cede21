"""Recorded runs of block-causal models and of their kin, replayed as `dkv verify` does."""

import functools
from pathlib import Path

import pytest

import dkv
from dkv.tools.verify import check_case, find_cases

GOLDEN = Path(__file__).parents[2] / "golden" / "families"
CASES = find_cases(GOLDEN)


@pytest.fixture(scope="module")
def loaded():
    return functools.cache(lambda folder: dkv.load(folder, device="cpu"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.folder.name}/{case.name}")
def test_golden(case, loaded):
    check_case(case, loaded(case.folder))


def test_all_runs_are_there():
    assert len(CASES) == 79 and not any(case.defect for case in CASES)
