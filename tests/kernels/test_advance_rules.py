"""The rules by which `advance_` fills several slots of a row at once."""

from fractions import Fraction

import pytest
import torch

from dkv import kernels
from dkv.kernels.commit.reference import ENTROPY_RULES, Chosen, Pass, Rules, State
from dkv.kernels.plan.reference import FIELDS


def filled(rules: Rules, confidence, entropy=None, *, score=None, slots=None, eligible=None, bound=None) -> list[int]:
    """The slots that a step of a row of masks fills, at least one. Of the given slots (all) the rest is known."""
    slots = list(range(len(confidence))) if slots is None else slots
    size = max(slots) + 2
    scored = torch.zeros(1, size, dtype=torch.bool)
    scored[0, slots] = True
    one, fresh, now = torch.ones(1, dtype=torch.int64), torch.zeros_like(scored), torch.zeros(1, 1, len(FIELDS)).long()
    tokens, rank, invalid = torch.zeros(1, size + 1).long(), torch.arange(size)[None], torch.zeros(1, dtype=torch.bool)
    state = State(tokens, scored.clone(), fresh, fresh.clone(), rank, 0 * one, now[0].clone(), 0 * one, invalid)
    may = None
    if eligible is not None:
        may = torch.zeros_like(scored)
        may[0, eligible] = True
    by_row = None if bound is None else torch.tensor([bound])
    known, entropy = torch.tensor(confidence), entropy if entropy is None else torch.tensor(entropy)
    choice = Chosen(7 + torch.arange(len(slots)), known, known if score is None else torch.tensor(score), entropy)
    kernels.advance_(state, now, Pass(scored, scored, may, one, 0 * one, by_row), choice, rules)
    return fresh[0].nonzero()[:, 0].tolist()


def test_entropies_are_spent_in_the_order_of_the_score(backend):
    """With "entropy" the largest of those that are filled is free, with "entropy_sum" the last."""
    confidence, entropy = [-0.1, -0.4, -0.2, -0.3], [0.5, 0.25, 1.0, 0.125]
    # The sums after 0.5, 1.0, 0.125 and 0.25.
    sums = {"entropy_sum": (0.0, 0.5, 1.5, 1.625), "entropy": (0.0, 0.5, 0.625, 0.875)}
    order = [0, 2, 3, 1]
    for rule, bounds in sums.items():
        for number, bound in enumerate(bounds, 1):
            assert filled(Rules(rule=rule, bound=bound), confidence, entropy) == sorted(order[:number])
            if number > 1:
                below = Rules(rule=rule, bound=bound - 1e-6)
                assert filled(below, confidence, entropy) == sorted(order[: number - 1])
        others = filled(Rules(rule=rule, bound=0.2), confidence, entropy, score=[-4.0, -3.0, -2.0, -1.0])
        assert others == [2, 3]
    for rule, expected in (("entropy_sum", [2]), ("entropy", [1, 2, 3])):
        assert filled(Rules(rule=rule, bound=0.5), confidence, entropy, eligible=[1, 2, 3]) == expected


@pytest.mark.parametrize("rule", ENTROPY_RULES)
def test_entropies_that_are_hardly_any_or_no_numbers(rule, backend):
    zero = Rules(rule=rule, bound=0.0)
    assert filled(zero, [-0.1, -0.2, -0.3], [0.0, 0.0, 0.0]) == [0, 1, 2]
    # What is not 0 is more than a bound of 0, however small.
    assert len(filled(zero, [-0.1, -0.2, -0.3], [1e-30, 1e-30, 1e-30])) == 1
    odd = [0.0, torch.nan, torch.inf, 1.0]
    assert filled(Rules(rule=rule, bound=torch.inf), [-0.1, -0.2, -0.3, -0.4], odd) == [0, 1, 2, 3]
    assert len(filled(Rules(rule=rule, bound=9.0), [-0.1, -0.2, -0.3, -0.4], odd)) == 2
    # -inf never fulfils a rule if it is told so, whatever its entropy.
    given = [-0.1, -torch.inf, -0.3], [0.1, 0.0, 0.1]
    assert filled(Rules(rule=rule, bound=9.0, finite_only=True), *given) == [0, 2]
    assert filled(Rules(rule=rule, bound=9.0), *given) == [0, 1, 2]


@pytest.mark.parametrize("rule", ENTROPY_RULES)
def test_the_largest_number_whose_sum_fulfils_the_bound(rule, backend):
    """Exact sums never fall as slots come in, so that it is also the number of those that do."""
    for _ in range(12):
        size = int(torch.randint(1, 12, ()))
        entropy = torch.rand(size) * torch.tensor([0.0, 1e-7, 0.1, 6.0])[torch.randint(4, (size,))]
        confidence = -torch.rand(size)
        exact = [Fraction(entropy[i].item()) for i in confidence.sort(descending=True).indices]
        spared = [max(exact[: n + 1]) if rule == "entropy" else exact[n] for n in range(size)]
        sums = [sum(exact[: n + 1]) - spared[n] for n in range(size)]
        assert sums == sorted(sums) and sums[0] == 0
        for bound in (0.02, 0.3, 5.0):
            expected = max(n for n, total in enumerate(sums, 1) if total <= bound)
            assert len(filled(Rules(rule=rule, bound=bound), confidence.tolist(), entropy.tolist())) == expected


def test_the_published_code_is_the_stricter_form(backend):
    for _ in range(12):
        entropy, confidence = (2 * torch.rand(9)).tolist(), (-torch.rand(9)).tolist()
        paper, code = (
            set(filled(Rules(rule=rule, bound=2.0), confidence, entropy)) for rule in ("entropy", "entropy_sum")
        )
        assert code <= paper
        # The same where they come by rising entropy.
        given = [-x for x in entropy], entropy
        both = [filled(Rules(rule=rule, bound=2.0), *given) for rule in ("entropy", "entropy_sum")]
        assert both[0] == both[1]


def test_slots_near_a_sure_one(backend):
    """Distances are in slots of the row, whatever stands between; the surest is filled in any case."""
    near = Rules(rule="near", bound=-0.1, near=-0.5, radius=2)
    assert filled(near, [-0.4, -0.4, -0.6, -0.1, -0.4, -0.5, -0.4]) == [1, 3, 4, 5]
    # At slots 0, 3, 5, 7, 8: the first and the last are too far.
    assert filled(near, [-0.3, -0.3, -0.05, -0.3, -0.3], slots=[0, 3, 5, 7, 8]) == [3, 5, 7]
    # No anchor: the surest alone. One that may not be filled is none.
    assert filled(near, [-0.3, -0.2, -0.3]) == [1]
    assert filled(near, [-0.3, 0.0, -0.2], eligible=[0, 2]) == [2]
    # What is filled as the surest is no anchor.
    assert filled(near, [-0.2, -0.15, -0.2]) == [1]
    # A bound of the row, here below that of what is near.
    assert filled(near, [-0.7, -0.55, -0.3, -0.6], bound=-0.6) == [1, 2, 3]
    assert filled(near, [-0.2, -0.15, -0.2], bound=-0.15) == [0, 1, 2]
    lowest = near._replace(bound=torch.finfo(torch.float32).min)
    assert filled(lowest, [-0.2, -torch.inf, -0.2]) == [0, 1, 2]
    assert filled(lowest._replace(finite_only=True), [-0.2, -torch.inf, -0.2]) == [0, 2]
    assert filled(near._replace(radius=0), [-0.2, -0.05, -0.2]) == [1]
    assert filled(near._replace(radius=10**6), [-0.2, -0.05, -0.2]) == [0, 1, 2]


def test_entropies_are_asked_for(backend):
    with pytest.raises(ValueError, match="'entropy' needs choice"):
        filled(Rules(rule="entropy", bound=1.0), [-0.1])
