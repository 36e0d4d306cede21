"""The policy of Streaming-dLLM (published code, xiaoshideta/Streaming-dLLM): far masked slots are left out."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dkv.core.schedule import Now
from dkv.core.validation import whole
from dkv.policies.base import Policy, View
from dkv.policies.fast_dllm import DualCache, PrefixCache

BASES: dict[str, Policy] = {policy.name: policy for policy in (PrefixCache(), DualCache())}


@dataclass(frozen=True)
class SuffixWindow(Policy):
    """A block cache over a canvas that ends soon after the block.

    Of what follows the current block a pass sees the next `window` slots and the last `tail` slots to fill. Those
    between them are neither computed nor seen as long as the block lasts. Slots keep their positions.

    Given text behind the last slot to fill (`dkv.infill`) is always seen; given text between the window and the tail
    is not, until a later block comes near it. That part is ours, as is `base="dual"`: the published code continues
    prompts, with the prefix cache. With one block, as in the time schedule, nothing is left out. In the sliding
    schedule (ours) the window goes with the region and is computed in every step, so "dual" does not go with it.

    Args:
        window: slots seen after the block (published: 96, longer for longer answers).
        tail: slots seen at the end of what is to fill (published: 1).
        base: "prefix" or "dual": what a cached step computes of the slots that are seen, as `PrefixCache` and
            `DualCache` do. With "dual" the window and the tail are computed in the first pass of the block alone.
    """

    name: ClassVar[str] = "suffix"
    window: int = 96
    tail: int = 1
    base: str = "prefix"

    def __post_init__(self):
        self._take(whole, "window", 0)
        self._take(whole, "tail", 0)
        if self.base not in tuple(BASES):
            raise ValueError(f'base must be "prefix" or "dual", got {self.base!r}')

    @property
    def slides(self) -> bool | None:
        # Slots would come into the window in steps that do not compute them.
        return False if self.base == "dual" else None

    def full(self, now: Now, shifted: bool) -> Tensor:
        return BASES[self.base].full(now, shifted)

    def active(self, view: View) -> Tensor:
        return BASES[self.base].active(view)

    def hidden(self, view: View) -> Tensor:
        rows = view.rows
        after = torch.arange(1, rows.size + 1, device=rows.rank.device)
        # Behind the last slot of the block.
        block = (after * (rows.rank == view.now.stop - 1)).amax(1, keepdim=True)
        stop = (rows.fill_end - self.tail).clamp(min=0)
        return torch.cat((torch.minimum(block + self.window, stop), stop), 1)
