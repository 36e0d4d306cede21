"""Keys and values of an earlier generation, taken over for the prefix that a longer text shares with it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dkv.core.blocks import Blocks
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
    model, rows, own = engine.model, engine.rows, engine.cache
    _check_is_one(past)
    if isinstance(engine.config.cache, NoCache) and engine.blocks is None:
        raise ValueError("kv_cache goes with a cache policy: without one every pass computes every slot")
    if engine.branches == 2 or len(past.tokens) != past.batch:
        raise ValueError("kv_cache does not go with cfg_scale: the branch without text has other keys")
    # One of several processes has some of the heads.
    kind = model.spec.num_layers, model.num_kv_heads, model.spec.head_dim, model.dtype
    _check_is_alike(past, own, kind)
    size = min(past.room, rows.size)
    same = past.tokens[:, :size].to(rows.tokens.device) == rows.tokens[:, :size]
    shared = (same & ~rows.masked[:, :size]).cumprod(1).bool() & past.seen[:, :size] & rows.everywhere[:, :size]
    spared = torch.zeros_like(rows.masked)
    spared[:, :size] = shared
    if engine.blocks is not None:
        spared = _whole_blocks(engine.blocks, past, spared)
    elif engine.shifted:
        spared &= ~sources(rows.masked)
    own.copy_from(past, size)
    engine.planner.spared = spared
    engine.seen.copy_(spared)
    return int(spared.sum())


def _check_is_one(past: KVCache) -> None:
    if not isinstance(past, KVCache) or past.tokens is None:
        raise ValueError("kv_cache must be the kv_cache of an output of dkv.generate")


def _check_is_alike(past: KVCache, own: KVCache, kind: tuple) -> None:
    """Raise ValueError where the caches do not hold the same; `kind` is that of the model, with its dtype."""
    if past.batch != own.batch:
        raise ValueError(f"kv_cache has {past.batch} rows, the call has {own.batch}")
    if past.dtype != own.dtype:
        raise ValueError(
            f"kv_cache is of a call with kv_cache_dtype={past.dtype!r}, and this one has {own.dtype!r}: give the same"
        )
    if past.kind is not None and past.kind != (*kind[:-1], kind[-1] if own.dtype == "auto" else torch.int8):
        raise ValueError(f"kv_cache is of another model: it has layers, heads, head size and dtype {past.kind}")


def _whole_blocks(blocks: Blocks, past: KVCache, shared: Tensor) -> Tensor:
    """Of the slots that are shared, bool [B, S], those of blocks that are so as a whole, and counted alike."""
    length, offset = past.blocks or (0, 0)
    alike = blocks.rule.causal or ((length == blocks.rule.length) & (blocks.offset == offset))
    known = shared.sum(1, keepdim=True) * alike
    return torch.arange(shared.shape[1], device=shared.device) < blocks.take_over(known)


def shared_prefixes(past: KVCache, own: KVCache, kind: tuple, texts: Tensor, lengths: Tensor) -> Tensor:
    """Copy the exact keys and values of the prefixes that texts share with those of an earlier generation.

    Args:
        past, own: the caches, from and to.
        kind: of the model: layers, key heads, head size and dtype.
        texts, lengths: [B, P] tokens from slot 0 on, and how many of them each row has.

    Returns:
        int64 [B], the lengths of these prefixes.

    Raises:
        ValueError: the cache is not that of a finished generation, or of another model or batch.
    """
    _check_is_one(past)
    _check_is_alike(past, own, kind)
    size = min(past.room, texts.shape[1])
    same = (past.tokens[:, :size].to(texts.device) == texts[:, :size]) & past.seen[:, :size].to(texts.device)
    own.copy_from(past, size)
    return torch.minimum(same.cumprod(1).sum(1), lengths)
