"""What the tests of the benchmarks share."""

from types import ModuleType

from dkv import kernels
from dkv.kernels.common.backend import load


def fast(operation: str) -> ModuleType:
    """The module whose function of that name computes an operation in PyTorch, for a test to put a wrong one there."""
    package = getattr(kernels, operation).__module__.split(".")[-2]
    return load(package, "torch")
