"""What makes the host wait for a device, or a CUDA graph capture fail."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dkv.bench.host import WAITS

MASKS = (torch.bool, torch.uint8)


class Waits(AssertionError):
    """An operation would wait."""


class NoWaits(TorchDispatchMode):
    """A context that refuses such operations. It does not see `tolist` and `numpy`, which on a CPU are none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise Waits(f"{name} waits for the device")
        # A list made into a tensor is a copy from the host; a number is an argument of the launch.
        if name == "lift_fresh" and args[0].dim():
            raise Waits("a tensor of host data is uploaded")
        indices = args[1] if name.startswith(("index", "_index_put", "_unsafe_index")) else ()
        if isinstance(indices, list | tuple) and any(i is not None and i.dtype in MASKS for i in indices):
            raise Waits(f"{name} with a boolean index waits for the device")
        return func(*args, **(kwargs or {}))
