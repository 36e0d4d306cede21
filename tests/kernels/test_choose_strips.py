"""choose_token_fused in strips of logits, for many rows; and the border beyond which it is."""

import math

import pytest
import torch

from dkv.kernels import RULES, Choice, Workspace
from dkv.kernels.common.backend import has_triton, interpreted

if not has_triton() or not (interpreted() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from dkv.kernels.choose import triton as backend
from dkv.kernels.choose.kernel import FLOATS, IDS
from dkv.kernels.choose.triton import by_strips, choose_token_fused
from dkv.kernels.common.launch import Chip, trial
from dkv.kernels.dev.cases import meta
from tests.kernels.sweeps import sweep
from tests.kernels.test_choose_triton import agrees, choose_fused


@pytest.mark.parametrize(
    ("rule", "temperature", "dtype"), sweep(RULES, (0.0, 0.8), (torch.float32, torch.float16, torch.bfloat16), quick=4)
)
def test_strips_give_what_the_kernel_gives(rule, temperature, dtype, monkeypatch):
    """Strips of three tiles that end beside parts, banned ids and limits, and a vocabulary that ends in a tile."""
    hidden = torch.randint(-2, 3, (6, 24)).to(dtype)
    weight, bias = (torch.randint(-2, 3, (900, 24)) / 4).to(dtype), (torch.randint(-8, 9, (900,)) / 4).to(dtype)
    logits = hidden.double() @ weight.double().T + bias.double()
    monkeypatch.setattr(backend, "STRIP_BYTES", 4 * 6 * 128 * 3)
    how = {"rule": rule, "temperature": temperature, "confidence_temperature": 0.7, "entropy": True}
    for parts, limits in (
        (1, {"banned": (0, 384, 899)}),
        (2, {"vocab_limit": 400}),
        (1, {"vocab_limit": 768}),
        (2, {}),
    ):
        found = choose_fused(hidden, weight, bias, by_strips, parts=parts, **how | limits)
        agrees(found, logits, **how | limits)
        token, *others = choose_fused(hidden, weight, bias, launch=None, **how | limits)
        assert torch.equal(found[0], token)
        for x, y in zip(found[1:], others, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-20, atol=1e-14)


def test_strips_without_bias_of_slices_of_nan(monkeypatch):
    buffer = torch.full((700, 90), math.nan)
    hidden = buffer[1:6, 1:41].copy_(torch.randint(-2, 3, (5, 40)))
    weight = buffer[10:311, 3:43].copy_(torch.randint(-2, 3, (301, 40)) / 4)
    monkeypatch.setattr(backend, "STRIP_BYTES", 1)  # a tile at a time
    for head in (weight, weight.T.contiguous().T):
        agrees(choose_fused(hidden, head, way=by_strips), hidden.double() @ weight.double().T)


@pytest.mark.parametrize("rows", [64, 65])
def test_ties_and_nan_on_both_sides_of_the_border(rows):
    hidden, weight = torch.ones(rows, 4), torch.zeros(5000, 4)
    weight[[130, 4097, 4999]] = 0.5
    hidden[5, 2] = math.nan
    token, confidence, _ = choose_fused(hidden, weight, way=border_way, launch=None)
    assert confidence.isnan().nonzero().tolist() == [[5]]
    assert (token[torch.arange(rows) != 5] == 130).all()


def border_way(hidden, weight, choice, bias, row_keys, work):
    return choose_token_fused(hidden, weight, choice, bias, None, row_keys, workspace=work)


def launched(rows: int, dtype: str = "bf16", arch: str = "sm_90", vocabulary: int = 126464) -> tuple[list, Workspace]:
    """What is launched on a GPU, and the scratch that it takes."""
    work = Workspace()
    with trial(chip=Chip(arch, 132)) as tried:
        hidden, weight = meta(rows, 64, dtype=dtype), meta(vocabulary, 64, dtype=dtype)
        choose_token_fused(hidden, weight, Choice(), None, None, None, workspace=work)
    return tried.calls, work


def test_the_border_of_the_table(monkeypatch):
    border = backend.MOST_FUSED["default"][2]
    assert len(launched(border)[0]) == 2 and launched(border)[0][0].arguments["weight"] is not None
    assert all(call.arguments["weight"] is None for call in launched(border + 1)[0][:-1])
    for other in (launched(4096, "fp32"), launched(4096, arch="gfx942")):
        assert other[0][0].arguments["weight"] is not None
    monkeypatch.setenv("DKV_BATCH_INVARIANT", "1")
    assert launched(4096)[0][0].arguments["weight"] is not None


@pytest.mark.parametrize("rows", [97, 128, 200, 512, 1000, 4096])
@pytest.mark.parametrize("vocabulary", [126464, 152064, 50257, 300])
def test_strips_cover_the_vocabulary_in_little_memory(rows, vocabulary):
    calls, work = launched(rows, vocabulary=vocabulary)
    *strips, merge = calls
    parts = merge.arguments["C"].PARTS.value
    assert parts & (parts - 1) == 0
    assert work.nbytes <= backend.STRIP_BYTES + rows * parts * 4 * (FLOATS.value + IDS.value)
    first = 0
    for call in strips:
        arguments = call.arguments
        width = arguments["tiles"] * arguments["C"].BLOCK_V.value
        assert arguments["first_column"] == first * width
        stop = arguments["first_column"] + arguments["x"].ptr.shape[1]
        first += call.grid[1]
        assert stop == min(first * width, vocabulary)
    assert first == parts and stop == vocabulary
