"""The recorded runs of newer policies: tokens and sets of slots after every pass."""

from collections import Counter
from pathlib import Path

import pytest

import dkv
from dkv.tools.verify import check_case, find_cases

CASES = [case for case in find_cases(Path(__file__).parents[2] / "golden") if "policy" in case.facts]
# Runs of each policy, of both models.
COUNTS = {"suffix": 20, "sliding": 24, "entropy_bound": 8, "skip": 16, "rollout": 28}


@pytest.fixture(scope="module")
def models():
    return {folder: dkv.load(folder, device="cpu") for folder in {case.folder for case in CASES}}


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.defect], ids=lambda case: f"{case.folder.name}/{case.name}"
)
def test_golden_policies(case, models):
    check_case(case, models[case.folder])


def test_only_published_slips_are_left_out():
    assert Counter(case.facts["policy"] for case in CASES) == COUNTS
    assert Counter(case.facts["policy"] for case in CASES if case.defect) == {"rollout": 14}
