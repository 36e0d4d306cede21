"""Combinations of parameters."""

from itertools import product
from typing import Any

import pytest


def sweep(*lists: Any, quick: int = 3) -> list:
    """All combinations of the values of some lists, as `product` gives them; one in `quick` is not slow.

    These are spread evenly: with two lists, each value of one stands beside every `quick`-th of the other.
    """
    cases = []
    for places in product(*(range(len(values)) for values in lists)):
        values = [x[place] for x, place in zip(lists, places, strict=True)]
        name = "-".join(str(x).removeprefix("torch.") for x in values)
        cases.append(pytest.param(*values, id=name, marks=() if sum(places) % quick == 0 else pytest.mark.slow))
    return cases
