"""Checks of a generation's inputs, before any work."""

from typing import Any

import torch
from torch import Tensor

from dkv.config import BY_ROW, DiffusionConfig
from dkv.kernels import checks


def checked_inputs(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, config: DiffusionConfig
) -> tuple[Tensor, Tensor]:
    """Ids as int64 [B, P] and the mask as bool [B, P].

    Raises:
        TypeError: the model is not one of ours.
        ValueError: shapes, dtypes, devices or settings do not fit each other or the model.
        IndexError: an id is outside the vocabulary.
    """
    if not hasattr(model, "spec") or not hasattr(model, "step"):
        raise TypeError(f"model must come from dkv.load(path) or dkv.wrap(hf_model), got {type(model).__name__}")
    spec = model.spec
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a tensor [B, P] of token ids, got {type(input_ids).__name__}")
    checks.shape("input_ids", input_ids, None, None)
    checks.dtype("input_ids", input_ids, checks.INTEGERS)
    if len(input_ids) == 0:
        raise ValueError("input_ids holds no rows")
    if input_ids.device != model.device:
        raise ValueError(f"input_ids is on {input_ids.device} but the model is on {model.device}: move one of them")
    if input_ids.numel():
        low, high = (int(v) for v in input_ids.aminmax())
        if low < 0 or high >= spec.vocab_size:
            raise IndexError(
                f"input_ids must be in 0..{spec.vocab_size - 1}, the model's vocabulary, got {low if low < 0 else high}"
            )
    mask = _checked_mask(input_ids, attention_mask)
    for name in BY_ROW:
        value = getattr(config, name)
        if isinstance(value, list) and len(value) != len(input_ids):
            raise ValueError(f"{name} is a list of {len(value)}, but input_ids has {len(input_ids)} rows")
    for row, prompt in enumerate(mask.sum(1).tolist()):
        new = config.of_row("max_new_tokens", row)
        if prompt + new > spec.max_positions:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_new_tokens ({new}) need {prompt + new} positions, the model has "
                f"{spec.max_positions}"
            )
    for name in ("mask_token_id", "vocab_limit", "eos_token_id", "pad_token_id"):
        value, top = getattr(config, name), spec.vocab_size - (name != "vocab_limit")
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number > top:
                raise ValueError(f"{name} must be at most {top} with a vocabulary of {spec.vocab_size}, got {number}")
    config.cache.check(spec.shifted)
    return input_ids.long(), mask


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    checks.shape("attention_mask", attention_mask, *input_ids.shape)
    checks.same_device(input_ids=input_ids, attention_mask=attention_mask)
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold 1 at real tokens and 0 at padding, and nothing else")
    return attention_mask.bool()
