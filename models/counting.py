"""What the weights of a model take, and how much of them a step reads: by count, without storage."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dkv.models.gemma import Gemma
from dkv.models.gemma_spec import GemmaSpec
from dkv.models.mixture import Experts
from dkv.models.skeleton import NETWORKS
from dkv.models.spec import ModelSpec
from dkv.models.weight_only import BITS, check_groups, weight_only_


class Read(NamedTuple):
    """Bytes that are read: at least, where all tokens go through the same experts, and at most."""

    least: int
    most: int


def forms(spec: ModelSpec | GemmaSpec) -> dict[str, nn.Module]:
    """By the name of what its weights are in, the network of a model as a GPU holds it, without storage."""
    with torch.device("meta"):
        plain = NETWORKS[type(spec)](spec).requires_grad_(False).to(torch.bfloat16)
    found = {"bfloat16": plain}
    for bits in () if isinstance(plain, Gemma) else BITS:
        try:
            check_groups(plain, bits)
        except ValueError:
            continue
        with torch.device("meta"):
            found[bits] = weight_only_(NETWORKS[type(spec)](spec).requires_grad_(False).to(torch.bfloat16), bits)
    return found


def held_bytes(model: nn.Module) -> int:
    """Bytes of all weights; what is a parameter twice counts once."""
    return sum(x.nbytes for x in _tensors(model))


def read_bytes(model: nn.Module, computed: int) -> Read:
    """What a step reads of the weights that computes so many slots: all, but of the embeddings one a slot, unless they
    are the head as well, and of the experts those that are chosen.
    """
    total = held_bytes(model)
    if not model.spec.tied_head:
        table = model.embed.weight
        total -= table.nbytes - min(computed, len(table)) * table[0].nbytes
    experts = [layer.experts for layer in model.layers if layer.experts is not None]
    of_one = sum(_expert_bytes(module) for module in experts)
    mixture = model.spec.mixture
    if mixture is None:
        return Read(total, total)
    total -= mixture.experts * of_one
    most = min(mixture.experts, computed * mixture.chosen)
    return Read(total + mixture.chosen * of_one, total + most * of_one)


def _expert_bytes(experts: Experts) -> int:
    """Of one expert; all are alike."""
    return sum(held_bytes(bank) for bank in (experts.gate_up, experts.down)) // experts.mixture.experts


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
