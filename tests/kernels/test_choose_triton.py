"""The Triton kernels of the choice: their noise, and the vocabulary divided into tiles and parts."""

import math

import pytest
import torch
from torch import Tensor

from dkv.kernels import RULES, Choice, Workspace
from dkv.kernels.choose import reference
from dkv.kernels.common import noise
from dkv.kernels.common.backend import has_triton, interpreted

if not has_triton() or not (interpreted() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from dkv.kernels.choose import kernel
from dkv.kernels.choose.torch import Found
from dkv.kernels.choose.triton import by_kernel, by_strips, choose_token
from dkv.kernels.common.arguments import strided
from dkv.kernels.common.launch import Launch, trial
from tests.kernels.sweeps import sweep

DEVICE = "cpu" if interpreted() else "cuda"
KEYS = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1], [5, 130, 7], [2**40, -1, 3], [-(2**63), 2**63 - 1, 2**32]])
PARTS = [1, 2, 3, 8]  # of a vocabulary of 5 tiles: 3 parts leave one tile for the last, 8 leave three of them empty
SMALL = Launch((4, 128), 4)
SMALL_FUSED = Launch((16, 128, 32), 4, 2)


class Poisoned(Workspace):
    """Hands out scratch full of NaN, and of an id that no vocabulary has."""

    def take(self, *args):
        scratch = super().take(*args)
        return scratch.fill_(torch.nan if scratch.is_floating_point() else -7)


def keys(rows: int) -> Tensor:
    return torch.stack([torch.arange(rows) + 2**33, torch.arange(rows) * 7], 1).to(DEVICE)


def settings(how: dict) -> tuple[Choice, dict]:
    """The choice among some arguments, and the others."""
    others = {name: how.pop(name) for name in ("parts", "launch", "row_keys") if name in how}
    return Choice(**how), others


def choose(logits: Tensor, **how) -> Found:
    choice, others = settings(how)
    row_keys = others.pop("row_keys", keys(len(logits)))
    with trial(**{"launch": SMALL} | others):
        return choose_token(logits.to(DEVICE), choice, row_keys, workspace=Poisoned())


def choose_fused(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, way=by_kernel, **how) -> Found:
    hidden, weight, bias = (None if x is None else x.to(DEVICE) for x in (hidden, weight, bias))
    choice, others = settings(how)
    row_keys = others.pop("row_keys", keys(len(hidden)))
    with trial(**{"launch": SMALL if way is by_strips else SMALL_FUSED} | others):
        return way(hidden, weight, choice, bias, row_keys, Poisoned())


def agrees(choice: Found, logits: Tensor, **how) -> None:
    """The choice is that of the definition from float64 logits."""
    expected = reference.choose_token(logits.to(DEVICE).double(), settings(how)[0], keys(len(logits)))
    assert torch.equal(choice[0], expected[0])
    for x, y in zip(choice[1:], expected[1:], strict=True):
        if x is not None or y is not None:
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), y, rtol=64 * 2**-23, atol=1e-14)


def same(actual: Found, expected: Found) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert x is y is None or torch.equal(x, y)


# Numbers


@triton.jit
def _noise_kernel(row_keys, bits, u, g, rows, K: tl.constexpr, V: tl.constexpr):
    r, column = tl.arange(0, 8), tl.arange(0, V)
    inside = r < rows
    a, b = kernel.row_hash(row_keys, r.to(tl.int64), inside, K)
    tl.store(bits + r * 2, a.to(tl.int64), mask=inside)
    tl.store(bits + r * 2 + 1, b.to(tl.int64), mask=inside)
    at = r[:, None] * V + column[None, :]
    tl.store(u + at, kernel.uniform(a, b, column), mask=inside[:, None])
    tl.store(g + at, kernel.gumbel(a, b, column), mask=inside[:, None])


def noise_of(row_keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row_keys = row_keys.to(DEVICE)
    bits = row_keys.new_empty(len(row_keys), 2)
    u, g = (torch.empty(len(row_keys), 256, device=DEVICE) for _ in range(2))
    _noise_kernel[(1,)](strided(row_keys), bits, u, g, len(row_keys), K=row_keys.shape[1], V=256)
    return bits, u, g


def test_the_same_numbers_every_day():
    """Those that `test_noise` pins."""
    assert noise_of(torch.tensor([[2, 3]]))[0].tolist() == [[2496276806, 1289549145]]


def test_noise_is_that_of_the_other_backends():
    row_keys = KEYS.to(DEVICE)
    bits, u, g = noise_of(row_keys)
    assert torch.equal(bits, torch.stack(noise.row_hash(row_keys), 1))
    assert torch.equal(u, noise.uniform(row_keys, 256))
    exact = -torch.log(-torch.log1p(-u.double()))
    assert ((g - exact).abs() <= 8 * 2**-24 * exact.abs().clamp(min=1)).all()


def test_noise_honours_strides():
    wide = torch.full((6, 7), -9)
    wide[:, 1::2] = KEYS
    same(noise_of(wide[:, 1::2])[1:], noise_of(KEYS)[1:])


@triton.jit
def _log1p_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, kernel.log1p(tl.load(x + at)))


def test_log1p_has_the_digits_of_small_numbers():
    small = torch.logspace(-38, 6, 512)
    near = torch.cat([-torch.logspace(-38, -1e-3, 510), torch.tensor([0.0, -1.0])])
    x = torch.cat([small, near]).to(DEVICE)
    out = torch.empty_like(x)
    _log1p_kernel[(1,)](x, out, N=len(x))
    exact = torch.log1p(x.double())
    off = torch.where(out == exact, 0, (out - exact).abs())
    assert (off <= 4 * 2**-24 * exact.abs()).all()


# Tiles and parts


@pytest.mark.parametrize(("parts", "rule", "temperature"), sweep(PARTS, RULES, (0.0, 0.8)))
def test_parts(parts, rule, temperature):
    logits = 4 * torch.randn(4, 5 * 128)
    both = {"banned": (130, 639), "vocab_limit": 131}
    for i, limits in enumerate(({}, {"banned": (0, 300, 639)}, {"vocab_limit": 200}, both)):
        how = {"parts": parts, "temperature": temperature, "rule": rule, "confidence_temperature": 0.7} | limits
        how["entropy"] = i % 2 == 0
        agrees(choose(logits, **how), logits, **how)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), sweep((1, 2, 127, 129, 601), (torch.float32, torch.float16, torch.bfloat16))
)
def test_odd_vocabularies_in_a_buffer_of_nan(vocabulary, dtype):
    buffer = torch.full((7, vocabulary + 5), math.nan, dtype=dtype)
    logits = buffer[1:6, 2 : vocabulary + 2].copy_(3 * torch.randn(5, vocabulary))
    for rule in RULES:
        for temperature in (0.0, 1.0):
            how = {"rule": rule, "temperature": temperature, "parts": 2, "entropy": True}
            agrees(choose(logits, **how), logits, **how)


@pytest.mark.parametrize("dim", [0, 1])
def test_logits_with_a_stride(dim):
    logits = torch.randn(5, 300)
    other = logits.T.contiguous().T if dim == 0 else torch.stack([logits, logits * math.nan], -1)[..., 0]
    assert other.stride(1) != 1
    same(choose(other, parts=2), choose(logits, parts=2))


@pytest.mark.parametrize(("parts", "rule"), sweep(PARTS, RULES))
def test_ties_across_tiles_and_parts_go_to_the_lowest_id(parts, rule):
    logits = torch.zeros(1, 640)
    logits[0, [130, 131, 450, 639]] = 0.5
    for banned, expected in (((), 130), ((130,), 131), ((130, 131), 450), ((130, 131, 450), 639)):
        how = {"rule": rule, "banned": banned, "parts": parts}
        assert choose(logits, **how)[0].item() == expected
        agrees(choose(logits, **how), logits, **how)


@pytest.mark.parametrize(("parts", "rule"), sweep(PARTS, RULES))
def test_infinities_across_tiles_and_parts(parts, rule):
    """Whole tiles of -inf, rows with nothing to choose, and a NaN or +inf in any tile."""
    logits = torch.full((6, 640), -math.inf)
    logits[0, 300], logits[1, [10, 600]] = 1.0, torch.tensor([1.0, 2.0])
    logits[2] = 0.0
    logits[2, 400], logits[3, 639], logits[5, 7] = math.nan, math.inf, 1.0
    token, confidence, entropy = choose(logits, rule=rule, parts=parts, banned=(7,), entropy=True)
    assert token[:2].tolist() == [300, 600]
    assert ((token >= 0) & (token < 640)).all()
    assert confidence.isnan().tolist() == entropy.isnan().tolist() == [False, False, True, True, True, True]
    agrees(choose(logits[:2], rule=rule, parts=parts, banned=(7,)), logits[:2], rule=rule, banned=(7,))


@pytest.mark.parametrize("parts", PARTS)
def test_probabilities_near_one_stay_apart_in_parts(parts):
    logits = torch.full((4, 640), -50.0)
    logits[:, 600] = torch.linspace(0, 8, 4)
    logits[:, 5] = -20.0
    for rule in RULES:
        agrees(choose(logits, rule=rule, parts=parts, entropy=True), logits, rule=rule, entropy=True)


@pytest.mark.parametrize("rule", ["margin", *(pytest.param(x, marks=pytest.mark.slow) for x in RULES if x != "margin")])
def test_a_row_gives_the_same_bits_in_any_company(rule, monkeypatch):
    # Products whose sums are exact: the interpreter's, by NumPy, depend on the place of a row on some machines.
    hidden, weight = torch.randint(-2, 3, (20, 40)).float(), torch.randint(-2, 3, (200, 40)) / 4
    logits = torch.randn(20, 200)

    def check(rows, **fixed):
        how = {"rule": rule, "temperature": 1.0, "entropy": True} | fixed
        for call, x, rest in ((choose, logits, ()), (choose_fused, hidden, (weight,))):
            whole = call(x[:rows], *rest, row_keys=keys(20)[:rows], **how)
            for i in (0, rows - 1):
                own = call(x[i : i + 1], *rest, row_keys=keys(20)[i : i + 1], **how)
                same(own, tuple(part[i : i + 1] for part in whole))

    check(8, parts=4)
    monkeypatch.setenv("DKV_BATCH_INVARIANT", "1")
    check(8)
    check(20, launch=None)


# Fused


@pytest.mark.parametrize(
    ("parts", "dtype", "size"),
    [
        pytest.param(1, torch.float32, 32, marks=pytest.mark.slow),
        pytest.param(2, torch.float16, 70, marks=pytest.mark.slow),
        (3, torch.bfloat16, 3),
        (8, torch.float32, 70),
    ],
)
def test_fused_parts(parts, dtype, size):
    """Products of multiples of 1/4 are exact in every dtype, and so are their sums in float32."""
    hidden = torch.randint(-2, 3, (18, size)).to(dtype)
    weight, bias = (torch.randint(-2, 3, (601, size)) / 4).to(dtype), (torch.randint(-8, 9, (601,)) / 4).to(dtype)
    logits = hidden.double() @ weight.double().T
    how = {"parts": parts, "banned": (2,), "vocab_limit": 600}
    agrees(choose_fused(hidden, weight, **how), logits, **how)
    for rule, entropy in (("margin", True), ("entropy", False)):
        how |= {"temperature": 0.8, "rule": rule, "entropy": entropy}
        agrees(choose_fused(hidden, weight, bias, **how), logits + bias.double(), **how)


def test_fused_rows_of_many_tiles():
    hidden, weight = torch.randint(-2, 3, (150, 20)).float(), torch.randint(-2, 3, (300, 20)) / 4
    agrees(choose_fused(hidden, weight, launch=None), hidden.double() @ weight.double().T)


def test_fused_slices_of_nan():
    buffer = torch.full((700, 90), math.nan)
    hidden = buffer[1:6, 1:41].copy_(torch.randint(-2, 3, (5, 40)))
    weight = buffer[10:311, 3:43].copy_(torch.randint(-2, 3, (301, 40)) / 4)
    bias = buffer[400:701, 80].copy_(torch.randint(-8, 9, (300,)) / 4)
    logits = hidden.double() @ weight[:300].double().T + bias.double()
    agrees(choose_fused(hidden, weight[:300], bias, parts=2), logits)
    agrees(choose_fused(hidden, weight[:300].T.contiguous().T, bias, parts=2), logits)
