"""Keys and values of an earlier generation, taken over for the prefix that a longer text shares with it."""

from typing import TYPE_CHECKING

import torch

from dkv.core.kv_cache import KVCache
from dkv.policies import NoCache
from dkv.policies.base import sources

if TYPE_CHECKING:
    from dkv.engine.engine import Engine


def take_over(engine: "Engine", past: KVCache) -> int:
    """Copy the keys and values of the prefixes that the rows share with an earlier text, and spare them.

    Returns:
        How many slots, all rows.

    Raises:
        ValueError: the cache is not that of a finished generation, or of another model, batch or kind.
    """
    spec, rows, own = engine.model.spec, engine.rows, engine.cache
    if not isinstance(past, KVCache) or past.tokens is None:
        raise ValueError("kv_cache must be the kv_cache of an output of dkv.generate")
    if isinstance(engine.config.cache, NoCache):
        raise ValueError("kv_cache goes with a cache policy: without one every pass computes every slot")
    if engine.branches == 2 or len(past.tokens) != past.batch:
        raise ValueError("kv_cache does not go with cfg_scale: the branch without text has other keys")
    if past.batch != own.batch:
        raise ValueError(f"kv_cache has {past.batch} rows, the call has {own.batch}")
    kind = past.kind
    if kind is not None and kind != (spec.num_layers, spec.num_kv_heads, spec.head_dim, engine.model.dtype):
        raise ValueError(f"kv_cache is of another model: it has layers, heads, head size and dtype {kind}")
    size = min(past.length, rows.size)
    same = past.tokens[:, :size].to(rows.tokens.device) == rows.tokens[:, :size]
    shared = (same & ~rows.masked[:, :size]).cumprod(1).bool() & past.seen[:, :size] & rows.everywhere[:, :size]
    spared = torch.zeros_like(rows.masked)
    spared[:, :size] = shared
    if engine.shifted:
        spared &= ~sources(rows.masked)
    own.copy_from(past, size)
    engine.planner.spared = spared
    engine.seen.copy_(spared)
    return int(spared.sum())
