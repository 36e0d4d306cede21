"""The form in which a model holds its weights: what is asked of `dkv.load`, which form that is, and how it is made."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from dkv.core.naming import instead
from dkv.models.gemma import Gemma
from dkv.models.int8 import Int8Linear, check_int8
from dkv.models.joining import join_
from dkv.models.packing import can_pack, check_packable, pack_
from dkv.models.transformer import Transformer
from dkv.models.weight_only import BITS, check_groups, weight_only_

Model = Transformer | Gemma


@dataclass(frozen=True)
class Asked:
    """What a caller of `dkv.load` asks for; the fields are its arguments.

    Attributes:
        dtype: one of torch, "auto" or None.
        device: where the model is to be.
        shared: several processes share the model.

    Raises:
        ValueError: they do not go together, or not with this machine.
    """

    dtype: torch.dtype | str | None
    device: torch.device
    pack: bool | None = None
    weights: str | None = None
    keep_head: bool = False
    shared: bool = False

    def __post_init__(self):
        if not (self.pack is None or isinstance(self.pack, bool)):
            raise ValueError(f"pack must be True, False or None, got {self.pack!r}")
        if not isinstance(self.keep_head, bool):
            raise ValueError(f"keep_head must be True or False, got {self.keep_head!r}")
        if self.weights is None:
            if self.keep_head:
                raise ValueError(
                    f"keep_head goes with weights={' or '.join(map(repr, BITS))}: it leaves their head as it is"
                )
            return
        if not isinstance(self.weights, str) or self.weights not in BITS:
            raise ValueError(f"weights={self.weights!r} is not known: {instead(self.weights, BITS)}")
        if self.device.type == "cpu":
            if self.weights != "int8":
                raise ValueError(f'weights="{self.weights}" is for GPUs: on a CPU take weights="int8"')
            check_int8(self.dtype, self.pack)
        elif self.pack is not None:
            raise ValueError(f"weights={self.weights!r} have a layout of their own: leave out pack={self.pack}")

    def dtype_of(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of a model that is stored in this one."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        # In half precision a CPU is slow.
        floor = torch.float32 if self.dtype is None and self.device.type == "cpu" else stored
        return torch.promote_types(stored, floor)


class Form(NamedTuple):
    """How weights are held.

    Attributes:
        dtype, device: in which, and where, they are read.
        made: gives a model that was read its form, in place.
    """

    dtype: torch.dtype
    device: torch.device
    made: Callable[[Model], Model]


def form_of(asked: Asked, model: Model, stored: torch.dtype) -> Form:
    """The form of a model, which is without storage as yet.

    Args:
        stored: the dtype of its embedding table in the file.

    Raises:
        ValueError: the model, or this machine, does not have the form that is asked for.
    """
    dtype, device = asked.dtype_of(stored), asked.device
    if isinstance(model, Gemma):
        if asked.pack or asked.weights:
            named = "pack=True" if asked.pack else f"weights={asked.weights!r}"
            raise ValueError(
                f"{named} is of models that fill masks; DiffusionGemma computes with its weights as they are"
            )
        return Form(dtype, device, _as_read if asked.pack is False else _joined_gemma)
    if asked.weights and device.type == "cpu":
        # As it lies in the file: one product after the other is rounded, and no float32 model stands in memory.
        return Form(stored, device, partial(_in_bytes, keep_head=asked.keep_head))
    if asked.weights:
        check_groups(model, asked.weights)
        # Read to the host, and not to a card that may have room for the result alone.
        made = partial(weight_only_, bits=asked.weights, device=device, keep_head=asked.keep_head)
        return Form(dtype, torch.device("cpu"), made)
    if asked.pack:
        check_packable("the model", dtype, device)
    if asked.pack is False:
        return Form(dtype, device, _as_read)
    packs = device.type == "cpu" and not asked.shared and can_pack(dtype)
    return Form(dtype, device, pack_ if asked.pack or packs else _joined)


def _as_read(model: Model) -> Model:
    return model


def _in_bytes(model: Transformer, keep_head: bool) -> Transformer:
    pack_(model, Int8Linear, keep_head)
    # A head that was kept is of float32 now.
    return pack_(model) if keep_head and can_pack() else model


def _joined_gemma(model: Gemma) -> Gemma:
    model.join_()
    return model


def _joined(model: Transformer) -> Transformer:
    join_(model)
    if model.device.type == "cuda":
        # The parts are freed, but too small for what comes next.
        torch.cuda.empty_cache()
    return model
