"""Checks of a generation's inputs, before any work."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dkv.engine import in_blocks
from dkv.engine.config import DiffusionConfig
from dkv.engine.ending import unwanted_ends
from dkv.engine.published_names import NO_EFFECT
from dkv.engine.settings import BY_ROW, DEFAULTS
from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import INTEGERS
from dkv.models.gemma import Gemma

# Ids that must be in the vocabulary, or with it.
IDS = ("mask_token_id", "vocab_limit", "eos_token_id", "eot_token_id", "pad_token_id")


def checked_inputs(
    model: Any, input_ids: Tensor | Mapping, attention_mask: Tensor | None, config: DiffusionConfig
) -> tuple[Tensor, Tensor]:
    """Ids as int64 [B, P] and the mask as bool [B, P]; where the settings have `max_length`, `max_new_tokens` follows.

    Raises:
        TypeError: the model is not one of ours, or the mask is no tensor.
        ValueError: shapes, dtypes, devices or settings do not fit each other or the model.
        IndexError: an id is outside the vocabulary.
    """
    check_settings(model, config)
    input_ids, attention_mask = taken_apart(input_ids, attention_mask)
    ids = checked_ids(model, input_ids)
    mask = checked_mask(input_ids, attention_mask)
    for name in BY_ROW:
        value = getattr(config, name)
        if isinstance(value, list) and len(value) != len(ids):
            raise ValueError(f"{name} is a list of {len(value)}, but input_ids has {len(ids)} rows")
    _resolve_max_length(config, ids.shape[1])
    _check_lengths(model.spec, mask, config)
    return ids, mask


def check_settings(model: Any, config: DiffusionConfig) -> None:
    """Raise TypeError if the model is not one of ours, ValueError if a setting does not go with it."""
    if isinstance(model, Gemma):
        raise ValueError(
            "DiffusionGemma has no masks to fill, so that of dkv's functions it has generate and stream alone: every "
            "token of its canvas may change in every step"
        )
    if isinstance(model, type) or not hasattr(model, "spec") or not hasattr(model, "step"):
        raise TypeError(f"model must come from dkv.load(path) or dkv.wrap(hf_model), got {type(model).__name__}")
    spec, vocabulary = model.spec, model.spec.vocab_size
    for name in IDS:
        value, top = getattr(config, name), vocabulary - (name != "vocab_limit")
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number > top:
                raise ValueError(f"{name} must be at most {top} with a vocabulary of {vocabulary}, got {number}")
    if config.eps != DEFAULTS["eps"] and not config.in_time(spec.shifted):
        raise ValueError(f'eps={config.eps!r} is of the time schedule, and this one has blocks: give schedule="time"')
    unwanted_ends(config, spec)
    config.cache.check(spec.shifted)
    in_blocks.check(spec, config)


def taken_apart(input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Ids and mask, which a tokenizer's encoding holds both of; ValueError: it holds something else, too."""
    if not isinstance(input_ids, Mapping):
        return input_ids, attention_mask
    if "input_ids" not in input_ids:
        raise ValueError(f"input_ids must be a tensor [B, P], or an encoding that holds one, got {sorted(input_ids)}")
    if unknown := sorted(set(input_ids) - {"input_ids", "attention_mask", *NO_EFFECT}):
        raise ValueError(f"the encoding given as input_ids holds {unknown[0]}, which the model has no use for")
    inner = input_ids.get("attention_mask")
    if inner is not None and attention_mask is not None:
        raise ValueError("attention_mask is given twice: in the encoding given as input_ids, and beside it")
    return input_ids["input_ids"], attention_mask if inner is None else inner


def checked_ids(model: Any, input_ids: Tensor) -> Tensor:
    """The ids as int64 [B, P]; ValueError, IndexError: they are none of the model's."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids must be a tensor [B, P] of token ids, got {type(input_ids).__name__}: give "
            'tokenizer(texts, return_tensors="pt"), or torch.tensor([[...]])'
        )
    checks.shape("input_ids", input_ids, None, None)
    checks.dtype("input_ids", input_ids, INTEGERS)
    if len(input_ids) == 0:
        raise ValueError("input_ids holds no rows")
    if input_ids.device != model.device:
        raise ValueError(f"input_ids is on {input_ids.device} but the model is on {model.device}: move one of them")
    if input_ids.numel():
        low, high = (int(v) for v in input_ids.aminmax())
        top = model.spec.vocab_size - 1
        if low < 0 or high > top:
            raise IndexError(f"input_ids must be in 0..{top}, the model's vocabulary, got {low if low < 0 else high}")
    return input_ids.long()


def _resolve_max_length(config: DiffusionConfig, prompt: int) -> None:
    """What `max_length` leaves for new tokens, by the columns of input_ids, padding included, as in transformers."""
    if config.max_length is None:
        return
    if config.max_length <= prompt:
        raise ValueError(
            f"max_length ({config.max_length}) counts the prompt, too, and input_ids has {prompt} columns: give a "
            "larger one, or max_new_tokens"
        )
    config.update(max_new_tokens=config.max_length - prompt)


def _check_lengths(spec: Any, mask: Tensor, config: DiffusionConfig) -> None:
    """Every row has the positions that it needs, and a plan."""
    rule = in_blocks.block_rule(spec, config)
    for row, prompt in enumerate(mask.sum(1).tolist()):
        new = config.of_row("max_new_tokens", row)
        needed = prompt + new + (rule.extra(prompt, new) if rule else 0)
        if needed > spec.max_positions:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_new_tokens ({new}) need {needed} positions, the model has "
                f"{spec.max_positions}"
            )
        if rule is None:
            config.check_steps(spec.shifted, row)


def checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask as bool [B, P]; TypeError, ValueError: it is none of these ids."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor [B, P] of 1 at real tokens and 0 at padding, got "
            f"{type(attention_mask).__name__}; settings are given by name, such as max_new_tokens=128"
        )
    checks.shape("attention_mask", attention_mask, *input_ids.shape)
    checks.same_device(input_ids=input_ids, attention_mask=attention_mask)
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold 1 at real tokens and 0 at padding, and nothing else")
    return attention_mask.bool()


def check_helpers(config: Any, generator: Any, streamer: Any = None) -> None:
    """Raise TypeError or ValueError where a generator or a streamer is none, or does not go with the settings."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}; a number is given as seed=")
    if generator is not None and config.seed is not None:
        raise ValueError(f"generator and seed={config.seed!r} are both sources of random numbers: give one of them")
    if streamer is not None and (isinstance(streamer, type) or not callable(getattr(streamer, "put", None))):
        raise TypeError(f"streamer must have put(ids), as in transformers, got {streamer!r}")
