"""Which implementation runs an operation."""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

# Each is a module of every operation's package, such as `dkv.kernels.attention.torch`.
BACKENDS = {
    "triton": "fused Triton kernels, on CUDA and ROCm",
    "torch": "fast PyTorch, on any device",
    "reference": "the eager definition of every operation, in few lines",
}

_chosen: ContextVar[str | None] = ContextVar("dkv_backend", default=None)


@functools.cache
def load(operation: str, name: str) -> ModuleType:
    """A backend of an operation's package. Loaded at first use: importing Triton takes time, and it may be missing.

    Raises:
        ImportError: Triton is not installed.
    """
    return importlib.import_module(f"dkv.kernels.{operation}.{name}")


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _launches() -> ModuleType:
    return importlib.import_module("dkv.kernels.common.launch")


def interpreted() -> bool:
    """Whether this process runs the Triton kernels in Triton's interpreter, on CPU tensors."""
    return has_triton() and _launches().INTERPRETED


def named(name: str, source: str) -> str:
    """`name`, checked; `source` is who gave it."""
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known are {', '.join(sorted(BACKENDS))}")
    if name == "triton" and not has_triton():
        raise ValueError(f"{source}: backend 'triton' needs the package triton, which is not installed")
    return name


def chosen() -> str | None:
    """The backend of `use_backend`, else of `DKV_BACKEND`; None where the device decides.

    Raises:
        ValueError: `DKV_BACKEND` names no backend.
    """
    if name := _chosen.get():
        return name
    name = os.environ.get("DKV_BACKEND")
    return name and named(name, "DKV_BACKEND")


@functools.cache
def too_old(device: torch.device) -> bool:
    """Whether a GPU is from before sm_80: Triton uses no tensor cores there since 3.3 (its pull request 5066)."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


def default(device: torch.device) -> str:
    """The backend of a device when none is chosen: "triton" on ROCm and on CUDA from sm_80 on, "torch" elsewhere."""
    return "triton" if device.type == "cuda" and has_triton() and not too_old(device) else "torch"


def current(x: Tensor) -> str:
    """The backend that runs an operation on `x`.

    float64 is for checking and runs on "torch" where "triton" would run.

    Raises:
        ValueError: "triton" was chosen for a tensor that it cannot run on.
    """
    name = chosen() or default(x.device)
    if name != "triton":
        return name
    if not x.is_cuda and not interpreted() and not _launches().pretended():
        raise ValueError(
            f"backend 'triton' was chosen, but the tensors are on {x.device}: move them to a GPU, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if too_old(x.device):
        capability = "{}.{}".format(*torch.cuda.get_device_capability(x.device))
        raise ValueError(
            f"backend 'triton' was chosen, but {x.device} is of compute capability {capability} and the kernels need "
            "8.0: choose 'torch', which is the default there"
        )
    return "torch" if x.dtype == torch.float64 else "triton"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the `with` block on backend `name`.

    Args:
        name: "triton" (the fused kernels, on a GPU), "torch" (any device) or "reference" (the eager
            definition). Without a choice: "triton" on ROCm and CUDA (from sm_80 on) tensors, "torch" on others.

    Raises:
        ValueError: no such backend.

    Example:
        >>> with dkv.use_backend("reference"):
        ...     output = dkv.generate(model, input_ids)
    """
    token = _chosen.set(named(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)
