"""On what the parts measure: device, backends, models, and sizes, which are tiny in a rehearsal."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dkv.bench.shapes import random_model, shape, tiny
from dkv.models import ModelSpec, Transformer
from dkv.models.joining import join_
from dkv.models.weight_only import weight_only_

SHAPE_OF = {"llada": "llada-8b", "dream": "dream-7b"}
TITLES = {"llada": "LLaDA-8B", "dream": "Dream-7B"}


@dataclass(frozen=True)
class Lab:
    """What the parts have at hand.

    Attributes:
        device: a GPU, or a CPU for a rehearsal.
        backends: those that run there, the one under test first.
        specs: the models by family.
        dtype: of their weights.
        slots: the lengths of a canvas.
        active: how many slots a cached step computes, the most telling number first.
        new: tokens of a generation.
    """

    device: torch.device
    backends: Sequence[str]
    specs: dict[str, ModelSpec]
    dtype: torch.dtype = torch.bfloat16
    slots: tuple[int, ...] = (512, 1024, 2048)
    active: tuple[int, ...] = (36, 4, 64, 256)
    new: int = 64

    @classmethod
    def of(cls, device: torch.device, backends: Sequence[str], family: str | None, layers: int | None) -> "Lab":
        """Both models whole, or one of them, or with so many layers; on a CPU tiny ones."""
        rehearsal = device.type == "cpu"
        specs = {name: shape(whole) for name, whole in SHAPE_OF.items() if family in (None, name)}
        specs = {name: tiny(spec) if rehearsal else spec for name, spec in specs.items()}
        specs = {name: replace(spec, num_layers=layers or spec.num_layers) for name, spec in specs.items()}
        if rehearsal:
            return cls(device, backends, specs, torch.float32, (48,), (8, 4), 8)
        return cls(device, backends, specs)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def model(self, family: str, weights: str = "") -> Transformer:
        """As it is loaded on a GPU: with joined products, and with weights of fewer bits where they are named."""
        model = self.plain_model(family)
        return weight_only_(model, weights) if weights else join_(model)

    def plain_model(self, family: str) -> Transformer:
        """The same weights, one product each."""
        return random_model(self.specs[family], self.device, self.dtype)

    def prompts(self, family: str, batch: int, length: int) -> Tensor:
        """int64 [batch, length], no masks among them."""
        return torch.randint(self.specs[family].mask_token_id, (batch, length), device=self.device)
