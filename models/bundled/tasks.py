"""Tasks with one exact answer, on which the bundled models are trained and measured.

In each of them a part of the answer follows from another part, in a direction of its own: the balance
from left to right, the sum from right to left, the cells from row to row.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

Problem = tuple[str, str]

TERMS, OPENING = 21, 50
DIGITS, PROPAGATE = 40, 0.4
# So wide that of 2^27 first rows hardly any comes up both in training and among the unseen.
WIDTH, GENERATIONS, RULE = 27, 4, 30


def balance(rng: random.Random, count: int = TERMS) -> Problem:
    """`count` deposits and withdrawals of 1 to 3, and the balance after each of them.

    The account opens with 50, so every balance has two digits, and each depends on the one before
    it: `+2 -3 +1 ...=` gives `52 49 50 ...`.

    Returns:
        prompt and answer, 63 and 62 characters for 21 terms.
    """
    total, terms, totals = OPENING, [], []
    for _ in range(count):
        amount = rng.choice((-3, -2, -1, 1, 2, 3))
        # Turned round at the ends, so that it keeps its two digits for any number of terms.
        amount = amount if 10 <= total + amount <= 99 else -amount
        total += amount
        terms.append(f"{amount:+d}")
        totals.append(str(total))
    return " ".join(terms) + "=", " ".join(totals)


def addition(rng: random.Random) -> Problem:
    """The sum of two numbers of 40 digits, which has 40 digits, too: `2719...+1280...=` gives `3999...`.

    A digit of the sum depends on the carry from its right. Four in ten pairs of digits add up to 9
    and hand a carry on, so that chains of them are common.

    Returns:
        prompt and answer, 82 and 40 characters.
    """
    first, second = [rng.randint(1, 4)], [rng.randint(1, 4)]
    for _ in range(DIGITS - 1):
        first.append(rng.randint(0, 9))
        second.append(9 - first[-1] if rng.random() < PROPAGATE else rng.randint(0, 9))
    a, b = ("".join(map(str, digits)) for digits in (first, second))
    return f"{a}+{b}=", str(int(a) + int(b))


def cells(rng: random.Random, generations: int = GENERATIONS) -> Problem:
    """Generations of 27 cells, by default four, under Wolfram's rule 30; those beyond the ends are dead.

    Each generation follows from the one above it: `..#..=` gives `.###./##..#`.

    Returns:
        prompt and answer, 28 and 111 characters.
    """
    row, rows = [rng.randint(0, 1) for _ in range(WIDTH)], []
    for _ in range(generations + 1):
        rows.append("".join(".#"[cell] for cell in row))
        wide = [0, *row, 0]
        row = [RULE >> (4 * wide[i] + 2 * wide[i + 1] + wide[i + 2]) & 1 for i in range(WIDTH)]
    return rows[0] + "=", "/".join(rows[1:])


@dataclass(frozen=True)
class Task:
    """A family of problems.

    Attributes:
        problem: draws one; prompts are of one length, and so are answers.
        new_tokens: slots of the canvas; those behind the answer are to be end tokens.
    """

    problem: Callable[[random.Random], Problem]
    new_tokens: int


TASKS: dict[str, Task] = {
    "balance": Task(balance, 64),
    "addition": Task(addition, 48),
    "cells": Task(cells, 112),
}
# Answers so long that most of a canvas is far from what is being written: 257 and 279 characters.
LONG_TASKS: dict[str, Task] = {
    "long-balance": Task(partial(balance, count=86), 264),
    "long-cells": Task(partial(cells, generations=10), 288),
}
ALL_TASKS = TASKS | LONG_TASKS


def held_out(count: int, seed: int = 20251, task: str = "balance") -> list[Problem]:
    """`count` problems of a seed that training never draws from."""
    rng = random.Random(f"held-out-{seed}")
    return [ALL_TASKS[task].problem(rng) for _ in range(count)]
