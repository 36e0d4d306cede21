"""Tasks with one exact answer, on which the bundled model is trained and measured."""

import random

BALANCE_TERMS = 21


def balance(rng: random.Random) -> tuple[str, str]:
    """A list of deposits and withdrawals, and the balance after each of them.

    The balance starts at 0 and stays within 0..99, so every number of the answer has two digits
    and depends on the number before it: `+7 -3 +9 ...` gives `07 04 13 ...`.

    Returns:
        prompt and answer, 63 and 62 characters for 21 terms.
    """
    total, terms, totals = 0, [], []
    for _ in range(BALANCE_TERMS):
        amount = rng.randint(1, 9)
        if rng.random() < 0.5:
            amount = -amount
        if not 0 <= total + amount <= 99:
            amount = -amount
        total += amount
        terms.append(f"{amount:+d}")
        totals.append(f"{total:02d}")
    return " ".join(terms) + "=", " ".join(totals)


def held_out(count: int, seed: int = 20251) -> list[tuple[str, str]]:
    """`count` problems of a seed that training never draws from."""
    rng = random.Random(f"held-out-{seed}")
    return [balance(rng) for _ in range(count)]
