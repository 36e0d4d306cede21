"""commit_."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dkv.kernels import BACKENDS, commit_, use_backend
from tests.kernels.sweeps import sweep

MASK = 99


@st.composite
def steps(draw) -> dict:
    """One step: few levels of confidence, so that ties are common, and rows that want too many or none."""
    b, s = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    n = draw(st.integers(1, s))
    level = st.sampled_from([-float("inf"), -3.0, -0.5, -0.25, 0.0])

    def grid(value: st.SearchStrategy) -> list[list]:
        return [[draw(value) for _ in range(n)] for _ in range(b)]

    slots = [sorted(draw(st.permutations(range(s)))[:n]) for _ in range(b)]
    return {
        "slots": slots if n < s or draw(st.booleans()) else None,
        "size": s,
        "token": grid(st.integers(0, 50)),
        "confidence": grid(level),
        "eligible": grid(st.booleans()),
        "count": [draw(st.integers(-1, n + 1)) for _ in range(b)],
    }


@pytest.mark.parametrize("name", sorted(BACKENDS))
@given(step=steps(), dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_any_step(name, step, dtype):
    b, s, slots = len(step["count"]), step["size"], step["slots"]
    canvas = torch.full((b, s), MASK)
    with use_backend(name):
        committed = commit_(
            canvas,
            torch.tensor(step["token"]),
            torch.tensor(step["confidence"], dtype=dtype),
            torch.tensor(step["eligible"]),
            torch.tensor(step["count"]),
            positions=None if slots is None else torch.tensor(slots),
        )
    for row in range(b):
        places = range(s) if slots is None else slots[row]
        entries = [i for i, open_ in enumerate(step["eligible"][row]) if open_]
        entries.sort(key=lambda i: -step["confidence"][row][i])  # stable: the lower slot first
        best = set(entries[: max(step["count"][row], 0)])
        assert {i for i, done in enumerate(committed[row].tolist()) if done} == best
        written = {places[i]: step["token"][row][i] for i in best}
        assert canvas[row].tolist() == [written.get(slot, MASK) for slot in range(s)]


def one_row(confidence, count: int, **changes):
    """A row of masks where token i belongs to entry i; the canvas and the slots committed."""
    n = len(confidence)
    args = {"eligible": torch.ones(1, n, dtype=torch.bool), "count": torch.tensor([count])} | changes
    canvas = torch.full((1, n), MASK)
    committed = commit_(canvas, torch.arange(n)[None], torch.as_tensor(confidence)[None], **args)
    return canvas[0].tolist(), committed[0].nonzero()[:, 0].tolist()


def test_no_confidence_at_all_still_comes_before_a_closed_slot(backend):
    eligible = torch.tensor([[False, True, True]])
    canvas, committed = one_row([0.0, -torch.inf, -torch.inf], 1, eligible=eligible)
    assert committed == [1]
    assert canvas == [MASK, 1, MASK]


def test_nan_at_a_closed_slot_does_not_matter(backend):
    eligible = torch.tensor([[False, True, True]])
    assert one_row([torch.nan, -2.0, -1.0], 1, eligible=eligible)[1] == [2]


def test_closed_entries_may_name_any_slot(backend):
    """Rows of different length are padded with slots that other entries of the row commit."""
    canvas = torch.tensor([[MASK, MASK, 7]])
    positions = torch.tensor([[0, 1, 0, 1]])
    eligible = torch.tensor([[True, True, False, False]])
    token, confidence = torch.tensor([[1, 2, 3, 4]]), torch.zeros(1, 4)
    commit_(canvas, token, confidence, eligible, torch.tensor([2]), positions=positions)
    assert canvas.tolist() == [[1, 2, 7]]


def test_strides(backend):
    wide = torch.full((2, 6), MASK)
    double = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]).repeat_interleave(2, 1)
    token = torch.tensor([[1, 2], [3, 4], [5, 6]]).T
    commit_(wide[:, ::2], token, double[:, ::2], torch.ones(3, 2, dtype=torch.bool).T, torch.tensor([1, 2]))
    assert wide.tolist() == [[MASK, MASK, MASK, MASK, 5, MASK], [2, MASK, 4, MASK, MASK, MASK]]


@pytest.mark.parametrize("by_position", [False, True], ids=["whole-canvas", "positions"])
def test_nothing_is_read_back(by_position, no_readback):
    canvas, eligible = torch.full((2, 5), MASK), torch.ones(2, 5, dtype=torch.bool)
    positions, count = (torch.arange(5).repeat(2, 1) if by_position else None), torch.tensor([1, 2])
    with use_backend("torch"), no_readback():
        commit_(canvas, canvas.clone(), torch.zeros(2, 5), eligible, count, positions=positions, validate=False)


def test_float64_is_ranked_in_float64(backend):
    confidence = torch.tensor([-0.5, -0.5 + 1e-12, -0.5 - 1e-12], dtype=torch.float64)
    assert one_row(confidence, 1)[1] == [1]


def test_nan_ranks_as_no_confidence(backend):
    confidence = [torch.nan, -torch.inf, -3.0, torch.nan]
    for count, expected in enumerate(([], [2], [0, 2], [0, 1, 2], [0, 1, 2, 3])):
        assert one_row(confidence, count, validate=False)[1] == expected


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [-(2**31), -1, 0, 5, 2**31 - 1])
def test_any_count(count, integer, backend):
    confidence, eligible, canvas = torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool), torch.full((1, 5), MASK)
    committed = commit_(canvas, canvas + 1, confidence, eligible, torch.tensor([count], dtype=integer))
    assert committed[0].tolist() == [i < count for i in range(5)]


def ranking(n: int, b: int = 3) -> dict:
    """Few levels of confidence, some of them -inf, and half of the entries closed."""
    return {
        "token": torch.randint(50, (b, n)),
        "log_confidence": torch.randint(4, (b, n)).float().log(),
        "eligible": torch.rand(b, n) < 0.5,
        "count": torch.randint(n, (b,)),
        "positions": torch.stack([torch.randperm(n + 3)[:n].sort().values for _ in range(b)]),
    }


@pytest.mark.parametrize(("tile", "n"), sweep([(1, 1), (4, 4), (4, 16), (16, 2), (8, 8)], (3, 4, 5, 9), quick=2))
def test_around_one_tile(tile, n, interpreted):
    """As many entries as a tile has, one fewer and one more, as those that are ranked and as the others."""
    from dkv.kernels.common.launch import Launch

    args = ranking(n)
    canvas, expected = torch.full((3, n + 3), MASK), torch.full((3, n + 3), MASK)
    with use_backend("reference"):
        best = commit_(expected, **args)
    assert torch.equal(interpreted.commit_(canvas, **args, launch=Launch(tile, 1)), best)
    assert torch.equal(canvas, expected)


def test_a_row_alone_and_in_company_is_the_same(backend):
    args = ranking(9, b=8)
    canvas = torch.full((8, 12), MASK)
    committed = commit_(canvas, **args)
    for i in range(8):
        own = torch.full((1, 12), MASK)
        assert torch.equal(commit_(own, **{name: x[i : i + 1] for name, x in args.items()})[0], committed[i])
        assert torch.equal(own[0], canvas[i])


def test_nothing_around_a_slice_of_a_canvas_is_written(backend):
    whole = torch.full((5, 16), MASK)
    args = ranking(9)
    commit_(whole[1:4, 2:14], **args | {"count": torch.tensor([9, 9, 9])})
    written = torch.zeros(5, 16, dtype=torch.bool)
    written[1:4, 2:14] = torch.zeros(3, 12, dtype=torch.bool).scatter(1, args["positions"], args["eligible"])
    assert torch.equal(whole != MASK, written)


# Public reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_A17_ties_go_to_the_lowest_slot(dtype, backend):
    for _ in range(10):
        assert one_row(torch.full((8,), 0.5, dtype=dtype), 3)[1] == [0, 1, 2]
    confidence = torch.zeros(100, dtype=dtype)
    confidence[::3] = 0.5
    assert one_row(confidence, 20)[1] == list(range(0, 60, 3))


def test_A17_close_confidences_are_ranked_in_float32(backend):
    confidence = torch.tensor([0.99609, 0.997, 0.998])
    assert confidence.bfloat16().unique().numel() == 1
    assert one_row(confidence, 1)[1] == [2]


@pytest.mark.parametrize("place", [-1, 5])
def test_A19_positions_outside(place, backend):
    guarded = torch.full((1, 7), MASK)
    canvas, positions = guarded[:, 1:6], torch.tensor([[0, place]])
    with pytest.raises(IndexError, match=rf"^positions must be in 0\.\.4, got {place}$"):
        commit_(
            canvas,
            positions,
            torch.zeros(1, 2),
            torch.ones(1, 2, dtype=torch.bool),
            torch.tensor([2]),
            positions=positions,
        )
    assert (guarded == MASK).all()


def test_S01_counts_are_per_row(backend):
    canvas = torch.tensor([[1, 2, 3, 4, MASK], [5, 6, MASK, MASK, MASK]])
    token = torch.arange(10, 20).view(2, 5)
    committed = commit_(canvas, token, torch.zeros(2, 5), canvas == MASK, torch.tensor([1, 3]))
    assert canvas.tolist() == [[1, 2, 3, 4, 14], [5, 6, 17, 18, 19]]
    assert committed.sum(1).tolist() == [1, 3]


def call(**changes):
    args = {
        "canvas": torch.full((2, 5), MASK),
        "token": torch.zeros(2, 5, dtype=torch.int64),
        "log_confidence": torch.zeros(2, 5),
        "eligible": torch.ones(2, 5, dtype=torch.bool),
        "count": torch.tensor([1, 2]),
    }
    return commit_(**args | changes)


FLOATS = torch.zeros(2, 5)
META = FLOATS.to("meta")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canvas": torch.zeros(5, dtype=torch.int64)}, r"^canvas must have shape"),
        ({"token": FLOATS[:, :4].long()}, r"^token must have shape"),
        ({"token": FLOATS.int()}, r"^token is torch.int32 but canvas is torch.int64"),
        ({"log_confidence": FLOATS[:1]}, r"^log_confidence must have shape"),
        ({"log_confidence": FLOATS.long()}, r"^log_confidence must be float16"),
        ({"log_confidence": FLOATS / 0}, r"^log_confidence is NaN at an eligible slot"),
        ({"eligible": FLOATS[:, :1].bool()}, r"^eligible must have shape"),
        ({"eligible": FLOATS.long()}, r"^eligible must be bool, got int64"),
        ({"count": torch.tensor([1])}, r"^count must have shape"),
        ({"count": torch.tensor([1.0, 2.0])}, r"^count must be int32, int64, got float32"),
        ({"positions": FLOATS[:1].long()}, r"^positions must have shape"),
        ({"positions": FLOATS.int()}, r"^positions must be int64, got int32"),
    ],
)
def test_arguments_are_checked(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("token", META.long()),
        ("log_confidence", META),
        ("eligible", META.bool()),
        ("count", META[:, 0].long()),
        ("positions", META.long()),
    ],
)
def test_A14_two_devices(name, x):
    with pytest.raises(ValueError, match=f"^{name} is on meta but canvas is on cpu"):
        call(**{name: x})
