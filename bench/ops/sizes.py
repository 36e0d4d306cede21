"""The steps of both models whose operations are timed, and their sizes on this device."""

import math
from dataclasses import replace

import torch

from dkv.bench.gpu.cases import Sizes
from dkv.bench.gpu.ops import ACTIVE, BATCHES, SHAPE_OF, TITLES
from dkv.bench.shapes import shape
from dkv.models import ModelSpec

# Name -> family, whether all slots are computed, rows.
STEPS = {
    f"{family}-{kind}-b{batch}": (family, kind == "full", batch)
    for family in SHAPE_OF
    for kind in ("full", "cached")
    for batch in BATCHES
}
SLOTS = {"cpu": 256, "cuda": 1024}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Of heads and vocabulary, by which a CPU's sizes are divided.
PART = 8


def scaled(spec: ModelSpec) -> ModelSpec:
    """An eighth of the vocabulary, and as small a part of the heads as leaves a key head; heads keep their size."""
    part = math.gcd(PART, spec.num_kv_heads)
    widths = ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size")
    smaller = {name: getattr(spec, name) // part for name in widths}
    return replace(spec, vocab_size=spec.vocab_size // PART, mask_token_id=spec.mask_token_id // PART, **smaller)


def sizes(step: str, device: torch.device) -> Sizes:
    """What a step named in `STEPS` computes on a device: the model whole on a GPU, else `scaled`."""
    family, full, batch = STEPS[step]
    spec, slots = shape(SHAPE_OF[family]), SLOTS[device.type]
    spec = spec if device.type == "cuda" else scaled(spec)
    return Sizes(spec, batch, slots, slots if full else ACTIVE, DTYPE[device.type])


def title(step: str, device: torch.device) -> str:
    """Model and step, such as "LLaDA-8B scaled cached"."""
    family, full, _ = STEPS[step]
    part = "" if device.type == "cuda" else " scaled"
    return f"{TITLES[family]}{part} {'full' if full else 'cached'}"
