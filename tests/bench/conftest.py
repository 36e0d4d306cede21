"""What the tests of the benchmarks share."""

from types import ModuleType

from dkv import kernels
from dkv.kernels.common.backend import load

# Functions of a backend that are not named as the operation is.
NAMES = {"plan_pass": "plan", "pack_pass": "pack"}


def fast(operation: str) -> ModuleType:
    """The module that computes an operation in PyTorch, for a test to put a wrong function there."""
    package = getattr(kernels, operation).__module__.split(".")[-2]
    return load(package, "torch")
