"""The problems of the bundled models: right answers, found here in another way, and how they are drawn."""

import itertools
import random

import pytest

from dkv.models.bundled.tasks import TASKS, held_out

LENGTHS = {"balance": (63, 62), "addition": (82, 40), "cells": (28, 111)}


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_fixed_and_fit_the_canvas(name):
    problems = held_out(50, task=name)
    assert {(len(prompt), len(answer)) for prompt, answer in problems} == {LENGTHS[name]}
    assert 32 <= LENGTHS[name][1] < TASKS[name].new_tokens <= 128


@pytest.mark.parametrize("name", TASKS)
def test_problems_follow_from_the_seed(name):
    assert held_out(5, 7, name) == held_out(5, 7, name)
    many = [prompt for seed in (1, 2) for prompt, _ in held_out(100, seed, name)]
    assert len(set(many)) == 200
    drawn = random.Random("train-0-0")
    assert TASKS[name].problem(drawn) not in held_out(100, 1, name)


def test_balance_adds_up():
    for prompt, answer in held_out(20, task="balance"):
        total = 50
        for amount, found in zip(prompt.removesuffix("=").split(), answer.split(), strict=True):
            total += int(amount)
            assert found == str(total) and len(found) == 2


def test_addition_digit_by_digit():
    chains = 0
    for prompt, answer in held_out(20, task="addition"):
        first, second = prompt.removesuffix("=").split("+")
        carry, digits = 0, []
        for a, b in zip(reversed(first), reversed(second), strict=True):
            carry, digit = divmod(int(a) + int(b) + carry, 10)
            digits.append(str(digit))
            chains += carry and int(a) + int(b) == 9
        assert carry == 0 and answer == "".join(reversed(digits))
    # Carries that come from further than the next pair of digits.
    assert chains > 40


def test_cells_follow_rule_30():
    """A cell lives if either its left neighbour lives, or at least one of itself and the right one, but not both."""
    for prompt, answer in held_out(20, task="cells"):
        rows = [prompt.removesuffix("="), *answer.split("/")]
        assert len(rows) == 5
        for above, row in itertools.pairwise(rows):
            wide = [c == "#" for c in f".{above}."]
            assert row == "".join(".#"[wide[i] ^ (wide[i + 1] | wide[i + 2])] for i in range(27))
