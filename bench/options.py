"""What `dkv bench` measures: a model, a canvas, and cache policies in turn."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dkv
from dkv.models import Transformer

# Settings of `dkv.generate` by policy; the first is what the others are compared with. Greedy goes with
# the random order, as published; all others with the most probable slot first.
LINEUP: dict[str, dict[str, Any]] = {
    "plain": {},
    "decode 8": {"cache": dkv.Decode(8)},
    "decode 32": {"cache": dkv.Decode(32)},
    "prefill": {"cache": dkv.Prefill()},
    "pd 8": {"cache": dkv.PrefillDecode(8)},
    "greedy 4": {"cache": dkv.Greedy(4, 4), "confidence": "random"},
    "greedy 16": {"cache": dkv.Greedy(16, 4), "confidence": "random"},
}


@dataclass(frozen=True)
class Options:
    """A measurement.

    Attributes:
        name: of the shape or checkpoint.
        model: as `dkv.load` gives it.
        eager: the same weights unpacked, for the baseline in eager PyTorch; the model itself where nothing is packed.
        prompt, new, batch: tokens of a prompt, slots to fill, rows.
        steps: passes; None: one per slot.
        rounds: timed runs of every contender, in turn, after one that is not timed.
        policies: names in `LINEUP`, "plain" first.
    """

    name: str
    model: Transformer
    eager: Transformer
    prompt: int = 128
    new: int = 128
    batch: int = 1
    steps: int | None = None
    rounds: int = 3
    policies: tuple[str, ...] = field(default=tuple(LINEUP))

    def prompts(self) -> Tensor:
        """int64 [batch, prompt]: seeded ids, the mask not among them."""
        spec, draw = self.model.spec, torch.Generator().manual_seed(1)
        ids = torch.randint(spec.vocab_size - 1, (self.batch, self.prompt), generator=draw)
        return (ids + (ids >= spec.mask_token_id)).to(self.model.device)
