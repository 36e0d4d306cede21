"""The masks of a pass, its packed entries, and windows around slots in Triton."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dkv.kernels.common.arguments import unit_stride
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, calls_of, meta
from dkv.kernels.plan.kernel import pack_kernel, plan_kernel, window_kernel
from dkv.kernels.plan.reference import ELIGIBLE, FIELDS, KINDS

# Tile: (slots,). One regime: all. None has been timed on a GPU; `dkv audit` finds no spilled registers.
TILES = {"default": {"all": Launch((1024,), 8)}, "interpreter": {"all": Launch((64,), 4)}}
CANDIDATES = [Launch((tile,), warps) for tile, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8))]
PLAN, PACK, WINDOW = (LaunchTable(name, TILES, CANDIDATES) for name in ("plan", "pack", "with_masked_window"))
COLUMNS = {name.upper(): FIELDS.index(name) for name in ("start", "stop", "left", "full")}
# Rows whose counts are added at a time.
ROWS = 64


def dense(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """Tensors [B, n] or [n], those copied whose rows are not dense."""
    return (x if x is None else unit_stride(x) for x in tensors)


def by_rows(**tensors: Tensor | None) -> dict[str, Any]:
    """Tensors [B, n] with dense rows as a kernel takes them, and how far apart their rows are."""
    return tensors | {f"{name}_row": 0 if x is None else x.stride(0) for name, x in tensors.items()}


def plan(now, masked, rank, lengths, active, chosen, everything, cut, invalid, kind, dynamic, by_chance, shifted):
    rows, slots = masked.shape
    like = {"dtype": torch.bool, "device": masked.device}
    computed, scored = (torch.empty(rows, slots, **like) for _ in range(2))
    eligible = torch.empty(rows, slots, **like) if kind in ELIGIBLE else None
    written = computed, scored, eligible, lengths.new_empty(rows), lengths.new_empty(5, rows)
    if rows:
        read = dense(now, masked, rank, active, chosen, everything, lengths, cut, invalid)
        PLAN.start(_plan, (*read, *written), kind, dynamic, by_chance, shifted)
    return written


def _plan(now, masked, rank, active, chosen, everything, *others):
    lengths, cut, invalid, computed, scored, eligible, count, report, kind, dynamic, by_chance, shifted = others
    given = by_rows(now=now, masked=masked, rank=rank, active=active, chosen=chosen, everything=everything)
    given |= {"lengths": lengths, "cut": cut, "invalid": invalid, "slots": masked.shape[1]}
    given |= {"computed": computed, "scored": scored, "eligible": eligible, "count": count, "report": report}
    given |= COLUMNS | {"KIND": kind, "DYNAMIC": dynamic, "BY_CHANCE": by_chance, "SHIFTED": shifted}

    def calls(launch: Launch) -> list[Call]:
        return [Call(plan_kernel, (len(masked),), launch, given | {"TILE": launch.tile[0]})]

    return "all", calls


def pack(tokens, active, scored, lengths, report, total, scored_total, shifted):
    rows = len(active)
    # Each in memory of its own: a part of another would be aligned for some totals and not for others, and what is
    # launched with it be compiled twice.
    written = *(tokens.new_empty(size) for size in [total] * 3 + [scored_total] * 3), tokens.new_empty(2, rows)
    if rows:
        read = *dense(tokens, active, scored, lengths), report.contiguous()
        PACK.start(_pack, (*read, *written), shifted)
    return written


def _pack(tokens, active, scored, lengths, report, entries, positions, entry_rows, *others):
    scored_slots, scored_rows, places, starts, shifted = others
    given = by_rows(tokens=tokens, active=active, scored=scored)
    given |= {"lengths": lengths, "report": report, "slots": active.shape[1], "starts": starts}
    given |= {"entries": entries, "positions": positions, "entry_rows": entry_rows, "total": len(entries)}
    given |= {"scored_slots": scored_slots, "scored_rows": scored_rows, "places": places, "scored_total": len(places)}

    def calls(launch: Launch) -> list[Call]:
        how = {"SHIFTED": shifted, "TILE": launch.tile[0], "ROWS": ROWS}
        return [Call(pack_kernel, (len(active),), launch, given | how)]

    return "all", calls


def with_masked_window(chosen, masked, centers, window):
    out = torch.empty(chosen.shape, dtype=torch.bool, device=chosen.device)
    if len(out):
        WINDOW.start(_window, (*dense(chosen, masked, centers), out), window)
    return out


def _window(chosen, masked, centers, out, window):
    given = by_rows(chosen=chosen, masked=masked, centers=centers)
    given |= {"out": out, "slots": out.shape[1], "count": centers.shape[1], "window": window}

    def calls(launch: Launch) -> list[Call]:
        return [Call(window_kernel, (len(out),), launch, given | {"TILE": launch.tile[0]})]

    return "all", calls


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch of each kind, with what is optional and without."""
    rows, slots = 3, 1001
    mask, longs = meta(rows, slots, dtype=torch.bool), meta(rows, slots, dtype=torch.int64)
    tokens, count = meta(rows, slots + 1, dtype=torch.int64), meta(rows, dtype=torch.int64)
    now, report = meta(rows, len(FIELDS), dtype=torch.int64), meta(5, rows, dtype=torch.int64)
    state = (now, mask, longs, count, mask)
    cases: list[tuple[str, LaunchTable, Any, tuple]] = []
    for i, kind in enumerate(KINDS):
        how = (meta(rows, dtype=torch.bool), kind, kind == "open", kind == "chosen", kind != "chosen")
        given = (mask if kind in ("window", "chosen") else None, None if i % 2 else mask, count, *how)
        cases.append((f"plan {kind}", PLAN, plan, (*state, *given)))
    for shifted in (False, True):
        given = (tokens, mask, mask, count, report, 70, 40, shifted)
        cases.append((f"pack{' shifted' if shifted else ''}", PACK, pack, given))
    cases.append(("window", WINDOW, with_masked_window, (mask, mask, meta(rows, 5, dtype=torch.int64), 4)))
    for name, table, function, given in cases:
        for regime, launch in table.on(arch):
            (call,) = calls_of(arch, regime, launch, function, *given)
            yield Case(f"{name} {launch.tile[0]}", call)
