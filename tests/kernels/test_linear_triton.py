"""The Triton kernels of products with weights of 8 and 4 bits: their tiles, parts and memory."""

import pytest
import torch

from dkv.kernels.common.backend import has_triton, interpreted

if not has_triton() or not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from dkv.kernels import choose_token_fused, int4_linear, int8_linear, use_backend
from dkv.kernels.common.launch import Chip, Launch, trial
from dkv.kernels.dev.cases import described, meta
from dkv.kernels.linear import triton as linear
from tests.kernels.test_linear import OPERATIONS, bits, by_expert, close, sample

# Public calls for `test_cases`: the operation, its arguments and options, and the kernels that it launches.
CALLS = {
    "choose_token_fused in 8 bits": (
        choose_token_fused,
        (torch.zeros(3, 16), torch.zeros(50, 16, dtype=torch.int8)),
        {"head_scales": torch.ones(50), "validate": False},
        ["choose_kernel", "merge_kernel"],
    ),
    "int8_linear in parts": (
        int8_linear,
        (torch.zeros(3, 2048), torch.zeros(50, 2048, dtype=torch.int8), torch.ones(50), torch.zeros(50)),
        {},
        ["linear_kernel", "add_kernel"],
    ),
    "int4_linear of experts": (
        int4_linear,
        (torch.zeros(3, 64), torch.zeros(2, 50, 32, dtype=torch.uint8), torch.ones(2, 50, 1)),
        {"ends": torch.tensor([1, 3], dtype=torch.int32)},
        ["linear_kernel"],
    ),
}
# Some that do not divide what they are for.
SMALL = {8: Launch((16, 32, 64), 4, 2), 4: Launch((16, 32), 4, 2)}


@bits
@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("inputs", [5 * 128, 200])
def test_tiles_and_parts(interpreted, bits, parts, inputs):
    """The last of 8 parts of 5 tiles have no inputs."""
    inputs -= inputs % 32 if bits == 4 else 0
    x, weight, bias = torch.randn(21, inputs), sample(bits, 75, inputs), torch.randn(75)
    found = getattr(interpreted, f"int{bits}_linear")(
        x, weight.stored, weight.scales, bias, launch=SMALL[bits], parts=parts
    )
    close(found, x.double() @ weight.exact.T + bias.double(), x.dtype)


@bits
@pytest.mark.parametrize("parts", [1, 2])
def test_an_expert_of_several_tiles(interpreted, bits, parts):
    x, weight, ends = torch.randn(60, 256), sample(bits, 4, 40, 256), torch.tensor([35, 35, 36, 60], dtype=torch.int32)
    found = getattr(interpreted, f"int{bits}_linear")(
        x, weight.stored, weight.scales, ends=ends, launch=SMALL[bits], parts=parts
    )
    close(found, by_expert(x, weight.exact, ends.tolist()), x.dtype)


@bits
@pytest.mark.parametrize("ends", [[-9, 4, 99], [3, 1, 2], [7, 7, 9]])
def test_wrong_ends_touch_no_other_memory(bits, ends):
    """They are not checked on a GPU. What no expert has is not written; rows that have one are right."""
    x, weight = torch.randn(12, 64)[4:9], sample(bits, 3, 20, 64)
    launcher = getattr(linear, f"int{bits}_linear")
    with trial(launch=SMALL[bits]):
        found = launcher(x, weight.stored, weight.scales, None, torch.tensor(ends, dtype=torch.int32))
    assert found.shape == (5, 20)
    if ends[0] == -9:
        close(found, by_expert(x, weight.exact, [0, 4, 5]), x.dtype)


@bits
@pytest.mark.parametrize("experts", [False, True], ids=["plain", "ends"])
def test_a_row_has_the_same_bits_in_any_company(bits, experts, monkeypatch):
    monkeypatch.setenv("DKV_BATCH_INVARIANT", "1")
    # As on an H100, where inputs are divided among programs.
    monkeypatch.setattr(linear, "splits", lambda device, programs, limit, each: 2)
    rows, inputs = 70, 8 * 128
    # Products of whole numbers are exact: the interpreter's, by NumPy, depend on the place of a row on some machines.
    x, weight = torch.randint(-2, 3, (rows, inputs)).float(), sample(bits, *([2] if experts else []), 40, inputs)

    def run(some: slice) -> torch.Tensor:
        count = len(range(rows)[some])
        ends = torch.tensor([count // 2, count], dtype=torch.int32) if experts else None
        with use_backend("triton"):
            return OPERATIONS[bits](x[some], weight.stored, weight.scales, ends=ends)

    whole = run(slice(0, rows))
    # With experts half of them are before the middle of all, too.
    for some in [slice(30, 40)] if experts else [slice(0, 1), slice(7, 12), slice(20, 70)]:
        assert torch.equal(run(some), whole[some])


@bits
def test_programs_without_the_company_of_others(bits, monkeypatch):
    """How many parts there are does not depend on the rows where rows are to have the same bits in any company."""
    monkeypatch.setenv("DKV_BATCH_INVARIANT", "1")
    given = (meta(256, 4096, dtype=torch.int8), meta(256, dtype="fp32"))
    if bits == 4:
        given = (meta(256, 2048, dtype=torch.uint8), meta(256, 32, dtype="fp32"))
    grids = set()
    for rows in (1, 16, 40, 700):
        with trial(chip=Chip("sm_90", 132)) as tried, use_backend("triton"):
            OPERATIONS[bits](meta(rows, 4096), *given)
        grids.add(tried.calls[0].grid[1:])
        assert [call.kernel.__name__ for call in tried.calls] == ["linear_kernel", "add_kernel"]
    assert len(grids) == 1


@bits
@pytest.mark.parametrize("rows", [(1, 9, 16), (33, 48, 64)], ids=["few", "more"])
def test_another_number_of_rows_needs_no_other_kernel(bits, rows):
    weight = meta(4096, 4096, dtype=torch.int8), meta(4096, dtype="fp32")
    if bits == 4:
        weight = meta(4096, 2048, dtype=torch.uint8), meta(4096, 32, dtype="fp32")
    kinds = []
    for count in rows:
        with trial(chip=Chip("sm_90", 132)) as tried, use_backend("triton"):
            OPERATIONS[bits](meta(count, 4096), *weight)
        kinds.append([(call.kernel, call.launch, described(call)) for call in tried.calls])
    assert kinds[1:] == kinds[:-1]


def test_a_tile_of_experts_is_as_large_as_what_they_have():
    """256 entries that 256 experts share are few for each."""
    for entries, experts, rows in ((256, 256, 16), (256, 8, 32), (4096, 8, 128)):
        weight = meta(experts, 1024, 2048, dtype=torch.int8), meta(experts, 1024, dtype="fp32")
        with trial(chip=Chip("sm_90", 132)) as tried, use_backend("triton"):
            int8_linear(meta(entries, 2048), *weight, ends=meta(experts, dtype=torch.int32))
        assert tried.regimes == [(rows, 2)] and tried.calls[0].grid[0] == experts


@bits
def test_the_weight_is_read_once_for_few_rows(bits):
    """Up to a tile of rows there is one program for each tile of outputs and part."""
    weight = meta(4096, 4096, dtype=torch.int8), meta(4096, dtype="fp32")
    if bits == 4:
        weight = meta(4096, 2048, dtype=torch.uint8), meta(4096, 32, dtype="fp32")
    for rows in (1, 16, 17, 32, 64, 128):
        with trial(chip=Chip("sm_90", 132)) as tried, use_backend("triton"):
            OPERATIONS[bits](meta(rows, 4096), *weight)
        assert tried.calls[0].grid[0] == -(-rows // tried.calls[0].launch.tile[0])
        assert rows > 32 or tried.calls[0].grid[0] == 1
