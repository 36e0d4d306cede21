"""Processes that share a model: the tokens of one process, and an end for all when one of them ends."""

import json

import pytest

from tests.dkv.sharing import cases, found, small_gemma, started


def check(kind: str, gemma) -> None:
    """Two processes with gloo give in every case what one gives."""
    processes = started(2, "-m", "tests.dkv.sharing", kind, gemma)
    # Worked out meanwhile.
    expected = {case[0]: found(case) for case in cases(kind, gemma)}
    (out, errors), (_, others) = [process.communicate(timeout=1500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors + others
    told = dict(json.loads(line) for line in out.splitlines())
    assert told.keys() == expected.keys()
    seeds = told.pop("seeds"), expected.pop("seeds")
    assert len(seeds[0]) == len(seeds[1])
    assert [name for name in told if told[name] != expected[name]] == []
    assert sum(tokens is not None for tokens in expected.values()) > 0.8 * len(expected)


def test_two_processes_give_the_tokens_of_one(tmp_path):
    check("quick", small_gemma(tmp_path / "gemma"))


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one_broadly(tmp_path):
    check("sweep", small_gemma(tmp_path / "gemma"))
