"""How many slots of keys and values there is memory for."""

import os
from typing import Any

import torch

from dkv.core.kv_cache import head_bytes

# More rows would make the masks of all rows longer than they are worth.
MOST_ROWS = 64
# Of the free memory: passes need some, too.
SHARE = {"cuda": 0.75, "cpu": 0.25}


def slot_bytes(model: Any, dtype: str = "auto") -> int:
    """Bytes of the keys and values of a slot, in all layers; `dtype` is `kv_cache_dtype`."""
    spec = model.spec
    return 2 * spec.num_layers * model.num_kv_heads * head_bytes(spec.head_dim, model.dtype, dtype)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, or of the computer."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 31


def slots_that_fit(model: Any, length: int, dtype: str = "auto") -> int:
    """Slots of whole rows of `length`, at least one, that a share of the free memory holds."""
    share = SHARE.get(model.device.type, SHARE["cpu"])
    rows = int(free_bytes(model.device) * share) // (slot_bytes(model, dtype) * length)
    return min(max(rows, 1), MOST_ROWS) * length
