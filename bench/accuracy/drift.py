"""How much keys and values change between steps, before, when and after a slot is decoded.

It is what dKV-Cache rests on (Ma et al. 2025, section on token dynamics): a slot's key and value move
most in the step that turns its mask into a token, and then settle. Hence they are cached one step late.

Beside these distances stands the one by which keys and values in 8 bits are off, where nothing is stale.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dkv.bench.problems import Problems
from dkv.bench.report import columns
from dkv.bench.steps import begin
from dkv.common.bar import Bar
from dkv.core.kv_cache import KVCache
from dkv.core.varlen import Segments
from dkv.engine.engine import Engine
from dkv.tools.text import encode

# Changes are told for so many steps before and after the one that turns a mask into a token.
REACH = 8
# Steps by which caching is put off, and how it is called.
DELAYS = {"at once": 0, "one step later": 1, "two steps later": 2}
NAMES = ("keys", "values")


def measure(model: Any, tokenizer: Any, problems: Sequence[Problems], batch: int, chat: bool = False) -> dict[str, Any]:
    """Plain decoding of the first `batch` problems of every family, one slot a step.

    A change is the Euclidean distance between what two passes computed for a slot, all heads of a layer
    together, divided by the length of the earlier. What is compared with the last pass is divided by its length.

    Returns:
        offsets: steps -8 to 8; 0 is from the pass that saw the mask and decoded it to the one that saw the token.
        change: {"keys": [layer][offset], "values": ...}, means over slots.
        stale: {"keys": {"at once": [layer], ...}, ...}, the distance to the last pass of what is cached then.
        prompt: {"keys": [layer], ...}, the distance from the first to the last pass of prompt slots.
        int8: {"keys": [layer], ...}, how far those of the final text are off, where all of them are kept in 8 bits and
            each layer attends to these.
        slots: how many were decoded. Families count by these in all means.

    Raises:
        ValueError: a prompt and its answer are longer than the model allows.
    """
    with Bar(sum(family.new for family in problems), "step") as bar:
        found = [_family(model, tokenizer, family, batch, chat, bar) for family in problems]

    def mean(name: str) -> Tensor:
        """Over the slots of all families; NaN where there is none."""
        total = sum(f[name].nan_to_num(0) * f["slots"] for f in found)
        return total / sum(f["slots"] * ~f[name].isnan() for f in found)

    change, stale, prompt, int8 = (mean(name) for name in ("change", "stale", "prompt", "int8"))
    return {
        "offsets": list(range(-REACH, REACH + 1)),
        "change": {kind: change[:, i].T.tolist() for i, kind in enumerate(NAMES)},
        "stale": {kind: dict(zip(DELAYS, stale[:, i].tolist(), strict=True)) for i, kind in enumerate(NAMES)},
        "prompt": {kind: prompt[i].tolist() for i, kind in enumerate(NAMES)},
        "int8": {kind: int8[i].tolist() for i, kind in enumerate(NAMES)},
        "slots": sum(f["slots"] for f in found),
    }


@torch.no_grad()
def _family(model: Any, tokenizer: Any, family: Problems, batch: int, chat: bool, bar: Bar) -> dict[str, Any]:
    """Means over the slots of one family: change [offset, 2, L], stale [delay, 2, L], prompt and int8 [2, L]."""
    ids, mask = (t.to(model.device) for t in encode(tokenizer, family.prompts[:batch], chat))
    engine = begin(model, ids, mask, family.new, {})
    rows = engine.rows
    text = rows.everywhere.cpu()
    prompt = ~rows.masked & rows.everywhere
    decoded = torch.full(rows.masked.shape, -1, device=ids.device)
    passes, cached, before, first = [], {}, None, None
    for time in range(family.new):
        engine.step()
        now = _keys_and_values(engine, engine.cache)
        passes.append(torch.full(now.shape[:-1], torch.nan) if before is None else _distance(now, before))
        first = now if first is None else first
        decoded[rows.fresh] = time
        for delay in DELAYS.values():
            at = (decoded == time - delay) & (decoded >= 0)
            cached[delay] = torch.where(at[None, None, ..., None], now, cached.get(delay, now))
        before = now
        bar.update()
    settled = (decoded >= 0) & (decoded <= time - max(DELAYS.values()))
    stale = [_distance(before, kept, before)[..., settled.cpu()].mean(-1) for kept in cached.values()]
    return {
        "change": _by_offset(torch.stack(passes), decoded.cpu()),
        "stale": torch.stack(stale),
        "prompt": _distance(before, first, before)[..., prompt.cpu()].mean(-1),
        "int8": _distance(_of_final_text(engine, "int8"), _of_final_text(engine, "auto"))[..., text].mean(-1),
        "slots": int((decoded >= 0).sum()),
    }


def _keys_and_values(engine: Engine, cache: KVCache) -> Tensor:
    """A copy [2, L, B, S, heads x D] of what the last pass over a cache computed."""
    layers, here = [cache.layers[layer.index] for layer in engine.model.layers], (slice(None), slice(engine.rows.size))
    parts = [[pair[i].at(here).plain(torch.float32).flatten(2) for pair in layers] for i in range(2)]
    return torch.stack([torch.stack(part) for part in parts])


def _of_final_text(engine: Engine, dtype: str) -> Tensor:
    """As `_keys_and_values`, of one pass over the text as it is at the end, with a cache of this dtype."""
    rows, cache = engine.rows, KVCache(len(engine.rows.tokens), engine.rows.size, dtype=dtype)
    owners, positions = rows.everywhere.nonzero(as_tuple=True)
    lengths = rows.everywhere.sum(1)
    segments = Segments(lengths.cumsum(0) - lengths, lengths, rows.size)
    ends = None if engine.blocks is None else engine.blocks.ends(positions, owners, rows.timetable.now())
    seen = {"rows": owners, "segments": segments, "key_ranges": rows.key_ranges, "ends": ends}
    engine.model.step(rows.tokens[owners, positions], positions, cache, **seen)
    return _keys_and_values(engine, cache)


def _distance(x: Tensor, y: Tensor, unit: Tensor | None = None) -> Tensor:
    """[2, L, B, S] on the CPU: the distance of slots, in lengths of `unit`, of `y` by default."""
    unit = y if unit is None else unit
    return ((x - y).float().norm(dim=-1) / unit.float().norm(dim=-1).clamp(min=1e-12)).cpu()


def _by_offset(change: Tensor, decoded: Tensor) -> Tensor:
    """Means [offset, 2, L] of changes [T, 2, L, B, S] by the steps from a slot's decoding; NaN without one."""
    times = torch.arange(len(change))[:, None, None]
    # A slot decoded in pass t is first seen as a token in pass t + 1.
    offset = torch.where(decoded >= 0, times - (decoded + 1), 10**6)
    offset[0] = 10**6
    by_slot = change.permute(0, 3, 4, 1, 2)
    return torch.stack([by_slot[offset == wanted].mean(0) for wanted in range(-REACH, REACH + 1)])


def summary(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Changes by layer: while masked (2 to 8 steps before), at the decoding, one step after, and later."""
    parts = {
        "masked": range(REACH - 1),
        "decoded": [REACH],
        "one step after": [REACH + 1],
        "later": range(REACH + 2, 2 * REACH + 1),
    }
    return {
        kind: {name: [_mean([layer[i] for i in places]) for layer in layers] for name, places in parts.items()}
        for kind, layers in found["change"].items()
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def table(found: dict[str, Any]) -> str:
    """A line per layer, of keys and of values."""
    blocks = []
    for kind, parts in summary(found).items():
        cells = parts | {f"cached {name}": kept for name, kept in found["stale"][kind].items()}
        cells |= {"prompt": found["prompt"][kind], "in 8 bits": found["int8"][kind]}
        by_layer = enumerate(zip(*cells.values(), strict=True))
        lines = [(f"layer {i}", *(f"{change:.1%}" for change in changes)) for i, changes in by_layer]
        blocks.append(columns((kind, *cells), lines))
    return "\n\n".join(blocks)


def meaning(found: dict[str, Any]) -> str:
    """What the table says, in words."""
    said = [
        "Change of a slot's keys and values between two passes, in lengths of the earlier ones: while it is masked,",
        "when its mask turns into its token, one step after, later. Then how far from those of the last pass they are,",
        "if they are cached in the pass that decodes the slot, one step later, or two; those of the prompt's first",
        "pass; and those of the final text, if they are kept in 8 bits.",
    ]
    for kind, parts in summary(found).items():
        at, after = _mean(parts["decoded"]), _mean(parts["one step after"])
        once, late = (_mean(found["stale"][kind][name]) for name in list(DELAYS)[:2])
        said.append(
            f"\n{kind.capitalize()}: {at:.0%} when a slot is decoded, {after:.1%} one step after. Cached at once they "
            f"would be {once:.0%} off at the end, cached one step later {late:.1%}; in 8 bits they are "
            f"{_mean(found['int8'][kind]):.1%} off."
        )
    return "\n".join(said)
