"""Tasks with one exact answer, on which the bundled model is trained and measured."""

import random

TERMS, OPENING = 21, 50


def balance(rng: random.Random) -> tuple[str, str]:
    """Deposits and withdrawals of 1 to 3, and the balance after each of them.

    The account opens with 50, so every balance has two digits, and each depends on the one before
    it: `+2 -3 +1 ...` gives `52 49 50 ...`.

    Returns:
        prompt and answer, 63 and 62 characters for 21 terms.
    """
    total, terms, totals = OPENING, [], []
    for _ in range(TERMS):
        amount = rng.choice((-3, -2, -1, 1, 2, 3))
        # Turned round at the ends, so that it keeps its two digits for any number of terms.
        amount = amount if 10 <= total + amount <= 99 else -amount
        total += amount
        terms.append(f"{amount:+d}")
        totals.append(str(total))
    return " ".join(terms) + "=", " ".join(totals)


def held_out(count: int, seed: int = 20251) -> list[tuple[str, str]]:
    """`count` problems of a seed that training never draws from."""
    rng = random.Random(f"held-out-{seed}")
    return [balance(rng) for _ in range(count)]
