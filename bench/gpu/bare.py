"""A Triton kernel that does next to nothing: what the host takes for a launch as Triton makes it."""

import torch
import triton
import triton.language as tl


@triton.jit
def _nothing(x, y, z, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + place, tl.load(x + place, place < count) + tl.load(y + place, place < count), place < count)


def launch(x: torch.Tensor) -> None:
    """Double x [n] in place."""
    _nothing[(1,)](x, x, x, x.numel(), BLOCK=64)
