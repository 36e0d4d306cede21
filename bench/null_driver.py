"""A driver for Triton that launches nothing: what a launch costs the host, on a machine without a GPU.

Kernels are compiled for an H100, once, by Triton and the assembler that comes with it; the cache of Triton keeps them.
Tensors are on the CPU. What a launch costs in CUDA's own driver, some 2 to 4 us, is not there.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from dkv.kernels.common.launch import INTERPRETED, Chip, trial

CHIP = Chip("sm_90", 132)
# The number of the device, which is that of tensors on a CPU.
DEVICE = -1


class NullDriver:
    """As much of a driver of Triton as its launches ask for.

    Attributes:
        launches: how many kernels were to be launched.
        compiled: how many were made ready to be.
    """

    def __init__(self):
        self.launches = self.compiled = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 227 * 1024}
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Made once for each compiled kernel."""
        self.compiled += 1
        return self._launch

    def _launch(self, *_: Any) -> None:
        self.launches += 1


@contextlib.contextmanager
def null_driver() -> Iterator[NullDriver]:
    """The kernels inside the `with` block are launched on a driver that does nothing, from tensors on the CPU.

    Integers that they would write are 0.

    Raises:
        RuntimeError: the kernels of this process run in Triton's interpreter.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 runs the kernels themselves: unset it to time their launches")
    null, config = NullDriver(), triton.runtime.driver
    before = config._active
    config.set_active(null)
    try:
        with trial(chip=CHIP, collect=False), _zeros():
            yield null
    finally:
        config._active = before


@contextlib.contextmanager
def _zeros() -> Iterator[None]:
    """New integers are 0, as what no kernel has written must be a valid index."""

    def zeroed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made if made.is_floating_point() else made.zero_()

        return call

    with (
        mock.patch.object(torch, "empty", zeroed(torch.empty)),
        mock.patch.object(torch, "empty_like", zeroed(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", zeroed(Tensor.new_empty)),
    ):
        yield
