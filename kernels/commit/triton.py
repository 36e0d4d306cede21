"""The commit of a step in Triton."""

from collections.abc import Iterator
from itertools import islice

import torch
import triton

from dkv.kernels.commit import torch as fallback
from dkv.kernels.commit.kernel import advance_kernel, commit_kernel
from dkv.kernels.commit.reference import ENTROPY_RULES, RULES, Chosen, Pass, Rules, State
from dkv.kernels.common.arguments import strided
from dkv.kernels.common.launch import Call, Launch, LaunchTable
from dkv.kernels.dev.cases import Case, calls_of, meta
from dkv.kernels.plan.reference import FIELDS
from dkv.kernels.plan.triton import by_rows, dense

# Tile: (entries that are ranked, entries they are compared with at a time). One regime: all. None has been timed on a
# GPU; `dkv audit` finds no spilled registers.
TABLE = LaunchTable(
    "commit_",
    {"default": {"all": Launch((16, 256), 4)}, "interpreter": {"all": Launch((128, 128), 4)}},
    [Launch(tile, warps) for tile in ((8, 256), (16, 128), (16, 256), (32, 256)) for warps in (2, 4, 8)],
)
# Tile: (slots that a step is taken with, slots they are compared with at a time). Sums of entropies take registers.
ADVANCE = LaunchTable(
    "advance_",
    {
        "default": {"all": Launch((256, 32), 4), "entropy": Launch((256, 16), 4)},
        "interpreter": dict.fromkeys(("all", "entropy"), Launch((64, 64), 4)),
    },
    # No candidates: to time them, a step would be taken again and again.
)
COLUMNS = {name.upper(): FIELDS.index(name) for name in ("index", "start", "stop", "next_block")}


def commit_(canvas, token, log_confidence, eligible, count, positions):
    if log_confidence.dtype == torch.float64:
        return fallback.commit_(canvas, token, log_confidence, eligible, count, positions)
    committed = torch.empty(eligible.shape, dtype=torch.bool, device=eligible.device)
    if eligible.numel():
        TABLE.start(_plan, (canvas, token, log_confidence, eligible, count, positions, committed))
    return committed


def _plan(canvas, token, confidence, eligible, count, positions, committed):
    batch, entries = eligible.shape
    tensors = {"canvas": canvas, "token": token, "confidence": confidence, "eligible": eligible, "count": count}
    tensors = {name: strided(x) for name, x in (tensors | {"positions": positions}).items()}

    def calls(launch: Launch) -> list[Call]:
        own, others = launch.tile
        arguments = {"committed": committed, "entries": entries, "OWN": own, "OTHERS": others}
        return [Call(commit_kernel, (triton.cdiv(entries, own), batch), launch, tensors | arguments)]

    return "all", calls


def advance_(state, table, passed, choice, rules):
    slots = (state.tokens, state.masked, state.fresh, state.seen, state.now, state.rank, state.at, state.cut)
    if choice.score.dtype == torch.float64 or any(x.stride(-1) != 1 for x in slots):
        return fallback.advance_(state, table, passed, choice, rules)
    if len(state.masked):
        read = table.contiguous(), *dense(*passed, *choice, rules.ends)
        ADVANCE.start(_advance, (*state, *read), *rules[1:])
    return None


def _advance(*given):
    parts = iter(given)
    state, table = State(*islice(parts, len(State._fields))), next(parts)
    passed, choice = Pass(*islice(parts, len(Pass._fields))), Chosen(*islice(parts, len(Chosen._fields)))
    rules = Rules(*parts)
    of_rows = {name: x for name, x in state._asdict().items() if name not in ("at", "cut", "invalid")}
    of_rows |= {"active": passed.active, "scored": passed.scored, "eligible": passed.eligible}
    named = by_rows(**of_rows) | {"at": state.at, "cut": state.cut, "invalid": state.invalid, "table": table}
    named |= {"count": passed.count, "starts": passed.starts, "bounds": passed.bound}
    named |= choice._asdict()
    named |= {"ends": rules.ends, "pad": rules.pad}
    named |= {"slots": state.masked.shape[1], "entries": len(choice.token)}
    named |= {"steps": table.shape[1], "table_row": table.stride(0)}
    named |= {"ends_count": 0 if rules.ends is None else len(rules.ends)}
    named |= {"bound": float(rules.bound), "near": float(rules.near), "radius": rules.radius}
    named |= COLUMNS | {"FIELDS": len(FIELDS), "COLUMNS": triton.next_power_of_2(len(FIELDS))}
    named |= {"RULE": rules.rule, "FINITE_ONLY": rules.finite_only}

    def calls(launch: Launch) -> list[Call]:
        own, others = launch.tile
        return [Call(advance_kernel, (len(state.masked),), launch, named | {"OWN": own, "OTHERS": others})]

    return "entropy" if rules.rule in ENTROPY_RULES else "all", calls


def audit_cases(arch: str) -> Iterator[Case]:
    """Every launch, on the whole canvas and on some positions of it, and by every rule."""
    for regime, launch in TABLE.on(arch):
        for kind, entries in (("whole", 1001), ("positions", 65)):
            longs, chosen = meta(2, entries, dtype=torch.int64), meta(2, entries, dtype=torch.bool)
            canvas, count = meta(2, 1001, dtype=torch.int64), meta(2, dtype=torch.int64)
            given = (canvas, longs, meta(2, entries, dtype=torch.float32), chosen, count)
            positions = longs if kind == "positions" else None
            (call,) = calls_of(arch, regime, launch, commit_, *given, positions)
            yield Case(f"commit_ {kind} {'x'.join(map(str, launch.tile))}", call)
    for regime, launch in ADVANCE.on(arch):
        for i, rule in enumerate(RULES):
            if (rule in ENTROPY_RULES) != (regime == "entropy"):
                continue
            mask, count = meta(3, 1001, dtype=torch.bool), meta(3, dtype=torch.int64)
            longs, now = meta(3, 1001, dtype=torch.int64), meta(3, len(FIELDS), dtype=torch.int64)
            tokens, invalid = meta(3, 1002, dtype=torch.int64), meta(3, dtype=torch.bool)
            state = State(tokens, mask, mask, mask, longs, count, now, count, invalid)
            by_row = meta(3, dtype=torch.float32) if rule == "near" else None
            passed = Pass(mask, mask, mask if i else None, count, count, by_row)
            values = (meta(70, dtype=torch.float32) for _ in range(3 if rule in ENTROPY_RULES else 2))
            choice = Chosen(meta(70, dtype=torch.int64), *values)
            rules = Rules(meta(2, dtype=torch.int64) if i < 2 else None, 0, rule, 0.5, rule == "factor", 0.4, 4)
            given = (state, meta(3, 9, len(FIELDS), dtype=torch.int64), passed, choice, rules)
            (call,) = calls_of(arch, regime, launch, advance_, *given)
            yield Case(f"advance_ {rule} {'x'.join(map(str, launch.tile))}", call)
