"""What a request must be before it waits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dkv.engine.config import DiffusionConfig
from dkv.engine.continuous import slots_needed
from dkv.engine.inputs import checked_inputs
from dkv.engine.run import drawn_seeds, listed_processors, mask_id_of
from dkv.engine.settings import BY_ROW
from dkv.serving.request import Request

# What a generation can give beside its tokens, and a request cannot.
RECORDS = ("output_history", "output_active", "output_confidences", "output_logits")


def checked(
    number: int,
    model: Any,
    input_ids: Any,
    config: DiffusionConfig,
    processor: Any,
    max_length: int,
    infill: bool = False,
    logprobs: bool = False,
) -> Request:
    """A request that can be answered.

    Args:
        number: its own.
        model: from `dkv.load` or `dkv.wrap`.
        input_ids, processor, infill, logprobs: as for `LLM.add`.
        config: its settings, which nobody else has; a seed that is not given is drawn.
        max_length: slots of a row.

    Raises:
        TypeError, ValueError, IndexError: the input or a setting is impossible, or it needs more slots than a row has.
    """
    for name in RECORDS:
        if getattr(config, name):
            raise ValueError(f"{name} does not go with requests, which tell their tokens alone: use dkv.generate")
    if config.schedule == "speculative":
        raise ValueError('schedule="speculative" does not go with requests yet: use dkv.generate')
    ids, _ = checked_inputs(model, _one_row(input_ids, model), None, config)
    needed = ids.shape[1] if infill else slots_needed(model, ids, config)
    if needed > max_length:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and its answer need {needed} slots, and a row has {max_length}: give "
            "fewer tokens, or make the LLM with a larger max_length"
        )
    if logprobs:
        _check_probability(config)
    config.update(seed=drawn_seeds(config.seed, 1, None))
    request = Request(number, ids, config, listed_processors(processor), wants_logprobs=logprobs)
    if infill:
        masks = (ids[0] == mask_id_of(model, config)).nonzero()
        request.gap = int(masks[0]) if len(masks) else ids.shape[1]
    shared = {name: value for name, value in config.settings().items() if name not in (*BY_ROW, "max_length")}
    request.key = repr((shared, infill, logprobs, None if request.processor is None else number))
    return request


def _check_probability(config: DiffusionConfig) -> None:
    """Raise ValueError where how sure a token is, is not the probability that the model gave it."""
    needed = {"temperature": 0, "confidence": "probability", "confidence_dtype": "exact"}
    needed |= {"confidence_eos_eot_inf": False, "edit_threshold": None}
    for name, value in needed.items():
        if (given := getattr(config, name)) != value:
            raise ValueError(f"logprobs need {name}={value!r}, got {given!r}: what else is known is no probability")


def _one_row(input_ids: Any, model: Any) -> Tensor:
    """A prompt as a tensor [1, P] where the model is."""
    if isinstance(input_ids, Mapping):
        input_ids = input_ids.get("input_ids")
    ids = input_ids if isinstance(input_ids, Tensor) else torch.tensor(list(input_ids), dtype=torch.int64)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"input_ids must be one prompt, [P] or [1, P], got {list(ids.shape)}: add them one by one")
    return ids.to(model.device)
