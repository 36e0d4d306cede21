"""Checks of a generation's inputs, before any work."""

from typing import Any

import torch
from torch import Tensor

from dkv.config import DiffusionConfig
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
    longest = int(mask.sum(1).max()) if mask.numel() else 0
    if longest + config.max_new_tokens > spec.max_positions:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and max_new_tokens ({config.max_new_tokens}) need "
            f"{longest + config.max_new_tokens} positions, the model has {spec.max_positions}"
        )
    for name in ("mask_token_id", "vocab_limit"):
        value, top = getattr(config, name), spec.vocab_size - (name == "mask_token_id")
        if value is not None and not (name == "vocab_limit") <= value <= top:
            raise ValueError(f"{name} must be at most {top} with a vocabulary of {spec.vocab_size}, got {value}")
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
