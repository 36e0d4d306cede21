"""cached_attention in Triton: what its launches, parts and scratch add to the definition."""

import math

import pytest
import torch
from torch import Tensor

from dkv.kernels import Workspace, cached_attention, use_backend
from dkv.kernels.attention.triton import TABLE
from dkv.kernels.common.launch import Call, Chip, Launch, trial
from dkv.kernels.dev.cases import meta

SMALL = [Launch((16, 16), 4), Launch((32, 16), 4), Launch((16, 64), 4)]
# B rows, N queries, S slots, Hq and Hkv heads, D head size: tiles that fill up and that do not, G in 1, 2, 4, 7.
SHAPES = [
    (1, 16, 32, 1, 1, 16),
    (2, 9, 37, 4, 2, 24),
    (1, 5, 49, 14, 2, 16),
    (1, 9, 33, 4, 1, 48),
    (1, 1, 1, 7, 1, 16),
]


def shape_id(x) -> str:
    return "B{}-N{}-S{}-H{}/{}-D{}".format(*x)


def definition(*args, **options):
    with use_backend("reference"):
        return cached_attention(*args, **options)


def case_id(shape, launch, parts) -> tuple[str, ...]:
    return shape_id(shape), "x".join(map(str, launch.tile)), f"{parts}-parts"


def inputs(shape) -> tuple[Tensor, Tensor, Tensor]:
    b, n, s, hq, hkv, d = shape
    return torch.randn(b, n, hq, d), torch.randn(b, s, hkv, d), torch.randn(b, s, hkv, d)


def rules(shape) -> dict[str, dict]:
    b, n, s, *_ = shape
    return {
        "open": {},
        "ranges": {"key_ranges": torch.tensor([[s // 3, s - s // 5]] * b)},
        "inside a tile": {"key_ranges": torch.tensor([[min(2, s - 1), min(9, s)]] * b)},
        "past the end": {"key_ranges": torch.tensor([[-3, s + 40]] * b)},
        "backwards": {"key_ranges": torch.tensor([[s, 0]] * b)},
        "key mask": {"key_mask": torch.rand(b, s) < 0.6},
        "pairs": {"mask": torch.rand(b, n, s) < 0.5, "key_ranges": torch.tensor([[s // 4, s]] * b)},
        "blocks": {"block_ids": (torch.randint(0, 4, (b, n)), torch.randint(0, 5, (b, s)))},
        "lengths": {"query_lengths": torch.full((b,), n // 2)},
    }


# Every shape with two launches at least, and every launch with shapes that fill its tile and that do not.
LAUNCHES = {
    SHAPES[0]: [(SMALL[0], 4), (SMALL[2], 2)],
    SHAPES[1]: [(SMALL[0], 4), (SMALL[1], 1), (SMALL[2], 2)],
    SHAPES[2]: [(SMALL[0], 1), (SMALL[1], 1)],
    SHAPES[3]: [(SMALL[0], 4), (SMALL[1], 1)],
    SHAPES[4]: [(SMALL[0], 4), (SMALL[2], 2)],
}


CASES = [(shape, launch, parts) for shape, launches in LAUNCHES.items() for launch, parts in launches]


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some rules", "others"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(case_id(*CASES[i])))
def test_tiles_and_parts(case, others, interpreted, assert_close):
    """A fourth of the rules with each launch, so that every rule has several; the slow ones are all others."""
    shape, launch, parts = CASES[case]
    q, k, v = inputs(shape)
    for i, options in enumerate(rules(shape).values()):
        if (i % 4 == case % 4) == others:
            continue
        out, lse = interpreted.cached_attention(q, k, v, launch=launch, parts=parts, return_lse=True, **options)
        exact, exact_lse = definition(*(x.double() for x in (q, k, v)), return_lse=True, **options)
        plain, plain_lse = definition(q, k, v, return_lse=True, **options)
        assert_close(out, exact, plain)
        assert_close(lse, exact_lse, plain_lse)


def test_scratch_may_hold_anything(interpreted):
    shape = SHAPES[1]
    q, k, v = inputs(shape)
    options = rules(shape)["ranges"]
    work = Workspace()
    first = interpreted.cached_attention(q, k, v, launch=SMALL[0], parts=2, workspace=work, **options)
    assert work.nbytes > 0
    for memory in work._memory.values():
        memory.fill_(torch.nan)
    second = interpreted.cached_attention(q, k, v, launch=SMALL[0], parts=2, workspace=work, **options)
    assert torch.equal(first, second)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_row_alone_and_in_a_batch_of_8(parts, interpreted):
    q, k, v = inputs((8, 9, 37, 4, 2, 16))
    ranges = torch.tensor([[i, 37 - i] for i in range(8)])
    together = interpreted.cached_attention(q, k, v, key_ranges=ranges, parts=parts)
    for i in (0, 5):
        row = slice(i, i + 1)
        assert torch.equal(
            interpreted.cached_attention(q[row], k[row], v[row], key_ranges=ranges[row], parts=parts), together[row]
        )


def test_batch_invariance_on_request(interpreted, monkeypatch):
    """Without fixed parts a batch of 8 is divided less than a row alone; the variable makes them equal."""
    q, k, v = inputs((8, 2, 300, 1, 1, 16))
    monkeypatch.setenv("DKV_BATCH_INVARIANT", "1")
    together = interpreted.cached_attention(q, k, v, launch=SMALL[0])
    assert torch.equal(interpreted.cached_attention(q[3:4], k[3:4], v[3:4], launch=SMALL[0]), together[3:4])


def test_same_bits_every_time(interpreted):
    q, k, v = inputs(SHAPES[1])
    assert torch.equal(*(interpreted.cached_attention(q, k, v, parts=2) for _ in range(2)))


@pytest.mark.parametrize("name", ["key_mask", "key_ranges"])
def test_what_a_hidden_slot_holds_is_not_read(name, interpreted):
    q, k, v = inputs((1, 3, 20, 2, 1, 16))
    hidden = torch.zeros(1, 20, dtype=torch.bool)
    hidden[0, 13:] = True
    options = {"key_mask": ~hidden} if name == "key_mask" else {"key_ranges": torch.tensor([[0, 13]])}
    expected = interpreted.cached_attention(q, k, v, **options)
    for x in (k, v):
        x[hidden] = torch.nan
    assert torch.equal(interpreted.cached_attention(q, k, v, **options), expected)


def test_offsets_within_a_tile_of_more_than_32_bits(interpreted):
    """Slots so far apart that slot * stride passes 2^31 within one tile; the memory between is never touched."""
    apart = 1 << 27
    storage = torch.empty(1, 20, 1, 16, dtype=torch.float16, device="meta").element_size() * apart * 20
    try:
        memory = torch.empty(apart * 20, dtype=torch.float16)
    except RuntimeError:
        pytest.skip(f"needs {storage >> 30} GiB of address space")
    k, v = (memory.as_strided((1, 20, 1, 16), (apart * 20, apart, 16, 1), offset) for offset in (0, 16))
    q = torch.randn(1, 3, 1, 16, dtype=torch.float16)
    k.normal_(), v.normal_()
    options = {"mask": torch.rand(1, 3, 20) < 0.7}
    out = interpreted.cached_attention(q, k, v, launch=SMALL[0], **options)
    assert torch.equal(out, interpreted.cached_attention(q, k.contiguous(), v.contiguous(), launch=SMALL[0], **options))


def test_a_scale_that_is_not_a_number(interpreted):
    assert interpreted.cached_attention(*inputs(SHAPES[1]), scale=torch.nan).isnan().all()


def collected(launch: Launch, slots: int, slot: int, row: int = 0, mask: tuple[int, int] | None = None) -> Call:
    """What is launched on an H100 for 2 rows of 40 queries and two heads, keys and a mask having these strides."""
    q = meta(2, 40, 2, 64)
    k = torch.empty_strided((2, slots, 2, 64), (row, slot, 64, 1), dtype=torch.bfloat16, device="meta")
    rules = {}
    if mask:
        rules["mask"] = torch.empty_strided((2, 40, slots), (0, *mask), dtype=torch.bool, device="meta")
    with use_backend("triton"), trial(launch=launch, chip=Chip("sm_90", 132)) as tried:
        cached_attention(q, k, k, **rules)
    return tried.calls[0]


@pytest.mark.parametrize(
    ("launch", "strides", "wide"),
    [
        (Launch((64, 32), 4), {"slot": 2**25}, True),
        (Launch((64, 32), 4), {"slot": 2**25 - 16}, False),
        (Launch((64, 64), 4), {"slot": 2**25 - 16}, True),
        (Launch((64, 64), 4), {"slot": 4096, "row": 2**40}, False),  # 64 bits of a program, not of a lane
        (Launch((64, 64), 4), {"slot": 4096, "mask": (2**24 - 16, 1)}, False),
        (Launch((64, 64), 4), {"slot": 4096, "mask": (2**24, 1)}, True),
        (Launch((128, 64), 4), {"slot": 4096, "mask": (2**24 - 16, 1)}, True),
        (Launch((64, 64), 4), {"slot": 4096, "mask": (1, 2**24)}, True),
    ],
)
def test_when_offsets_within_a_tile_take_64_bits(launch, strides, wide):
    call = collected(launch, 1000, **strides)
    assert call.arguments["C"].WIDE.value == wide and call.rare == wide


def test_llama_shaped_keys_never_take_64_bits():
    for regime, launch in TABLE.on("sm_90"):
        if regime[1:] == ("plain", 2, 128):
            assert not collected(launch, 2**20, 32 * 128).arguments["C"].WIDE.value


@pytest.mark.parametrize(
    ("tokens", "heads", "slots", "programs"),
    [
        (4, (28, 4), 512, 4 * 16),  # one tile of slots to a program
        (4, (28, 4), 2048, 4 * 32),
        (64, (28, 4), 512, 16 * 8),
        (4, (32, 32), 512, 32 * 4),
        (64, (32, 32), 2048, 128),
        (4, (4, 1), 10**5, 32),  # the most parts
        (4, (4, 1), 192, 1),  # not worth a merge
        (2048, (32, 32), 2048, 512),
    ],
)
def test_a_small_grid_fills_the_device(tokens, heads, slots, programs):
    q, k = meta(1, tokens, heads[0], 128), meta(1, slots, heads[1], 128)
    with use_backend("triton"), trial(chip=Chip("sm_90", 132)) as tried:
        cached_attention(q, k, k)
    first, *merge = tried.calls
    assert math.prod(first.grid) == programs
    tiles = math.ceil(tokens * heads[0] // heads[1] / first.launch.tile[0])
    assert len(merge) == (programs > tiles * heads[1])


def test_A11_bfloat16_in_the_interpreter(interpreted):
    q, k, v = (torch.randint(-2, 3, (1, 16, 1, 16)).bfloat16() for _ in range(3))
    out = interpreted.cached_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    exact = definition(*(x.double() for x in (q, k, v)))
    assert (out - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_every_regime_has_an_entry_on_every_chip():
    regimes = set(TABLE.entries["default"])
    assert len(regimes) == 3 * 6 * 6
    for entries in TABLE.entries.values():
        assert set(entries) <= regimes
        assert all(min(launch.tile) >= 16 for launch in entries.values())
