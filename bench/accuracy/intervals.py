"""Intervals of shares, of means, and of their differences: how sure a measurement is."""

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson (1927)."""
    share, z = right / count, Z
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def paired(found: Sequence[bool], wanted: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two shares on the same problems, in points, and its 95 % interval (Agresti and Min, 2005).

    Half a problem is added to each of the four ways in which a pair can come out, which keeps the
    interval honest where the two hardly differ.
    """
    count = len(found)
    won = sum(a and not b for a, b in zip(found, wanted, strict=True))
    lost = sum(b and not a for a, b in zip(found, wanted, strict=True))
    middle = (won - lost) / (count + 2)
    won, lost, count = won + 0.5, lost + 0.5, count + 2
    half = Z * math.sqrt((won + lost) - (won - lost) ** 2 / count) / count
    return 100 * (won - lost) / (count - 2), 100 * (middle - half), 100 * (middle + half)


def difference(found: Sequence[float], wanted: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of numbers of the same texts, and its 95 % interval, normal; of one text without an end."""
    apart = [a - b for a, b in zip(found, wanted, strict=True)]
    middle = statistics.fmean(apart)
    half = Z * statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
    return middle, middle - half, middle + half


def enough(half: float, count: int, wanted: float) -> int:
    """How many problems would bring the interval of `paired` from +-`half` points, of `count` problems, to +-`wanted`.

    The two are taken to differ on the same share of the problems as now.
    """
    differing = max((half / 100 / Z * (count + 2)) ** 2 - 1, 0.0) / count
    more = count
    while 100 * Z * math.sqrt(differing * more + 1) / (more + 2) > wanted:
        more = math.ceil(1.05 * more)
    return more
