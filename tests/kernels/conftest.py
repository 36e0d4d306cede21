"""What the tests of the operations share."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from dkv import kernels
from dkv.kernels import use_backend
from dkv.kernels.common.backend import interpreted as in_interpreter
from tests.waits import NoWaits

# Shapes are small: more threads only wait for each other.
torch.set_num_threads(1)
settings.register_profile("kernels", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("kernels")


def pytest_make_parametrize_id(val) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["torch", "reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs on CPU tensors, in use during the test; the kernels in the interpreter."""
    if request.param == "triton" and not in_interpreter():
        pytest.skip("needs TRITON_INTERPRET=1")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def interpreted() -> SimpleNamespace:
    """The operations in Triton; they also take a launch and a number of parts of the test's own."""
    if not in_interpreter():
        pytest.skip("needs TRITON_INTERPRET=1")
    from dkv.kernels.common.launch import trial

    def tried(operation):
        def call(*args, launch=None, parts=None, **options):
            with use_backend("triton"), trial(launch=launch, parts=parts):
                return operation(*args, **options)

        return call

    names = ("cached_attention", "choose_token", "choose_token_fused", "commit_", "rms_norm", "rope_scatter_", "swiglu")
    names += ("row_change", "keep_rows_", "int8_linear", "int4_linear")
    names += ("attention_mass", "plan_pass", "pack_pass", "with_masked_window", "advance_")
    return SimpleNamespace(**{name: tried(getattr(kernels, name)) for name in names})


def _assert_close(actual: Tensor, exact: Tensor, plain: Tensor | None = None) -> None:
    """`actual` is off by no more than twice what `plain` is off, and a few roundings.

    Args:
        exact: the answer, float64.
        plain: the same sum written in plain torch, at the dtype of `actual`; if that is float64, at
            float32, as nothing is more exact than float64. Its error counts in roundings of its dtype.
    """
    assert actual.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    error = torch.where(actual == exact, 0, (actual - exact).abs())
    eps, eps_sum = (torch.finfo(t).eps for t in (actual.dtype, torch.promote_types(actual.dtype, torch.float32)))
    size = exact[exact.isfinite()].abs()
    bound = (eps / 2 + 4 * eps_sum) * size.amax().item() if size.numel() else 0.0
    if plain is not None:
        assert plain.dtype == (torch.float32 if actual.dtype == torch.float64 else actual.dtype)
        off = torch.where(plain == exact, 0, (plain - exact).abs()).amax().item()
        bound += 2 * off * eps / torch.finfo(plain.dtype).eps
    assert (error <= bound).all(), f"off by {error.amax().item():.3g}, allowed {bound:.3g}"


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    return _assert_close


def transposed(x: Tensor) -> Tensor:
    dims = (1, 2) if x.dim() > 2 else (0, 1)
    return x.transpose(*dims).contiguous().transpose(*dims)


def within_nan(x: Tensor) -> Tensor:
    """A slice of a larger buffer of NaN."""
    buffer = x.new_full([size + 2 for size in x.shape], torch.nan)
    return buffer[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


def every_second(x: Tensor) -> Tensor:
    """A stride of 2 in the last dimension, with NaN between."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@pytest.fixture(params=[transposed, within_nan, every_second], ids=lambda f: f.__name__)
def restride(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """A function that gives the same values with other strides."""
    return request.param


@pytest.fixture(scope="session")
def no_readback() -> type[NoWaits]:
    """A context in which an operation that would stop a CUDA stream fails."""
    return NoWaits
