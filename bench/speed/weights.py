"""What weights of fewer bits win on a CPU, and keys and values in 8 bits cost, against a model in packed float32."""

import copy
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import dkv
from dkv.bench.contenders import of_lineup
from dkv.bench.lineup import COMPARED
from dkv.bench.options import Options
from dkv.bench.report import columns
from dkv.bench.speed.floor import PARTS, ROUNDS, STEPS, by_part
from dkv.bench.steps import HalfWay
from dkv.bench.timing import in_turn, timed
from dkv.common.bar import Bar
from dkv.models.int8 import Int8Linear, why_not_int8
from dkv.models.packed import PackedProduct, why_not_packed
from dkv.models.packing import pack_

# Against which the others are measured, and the policies where none are named.
FULL, POLICIES = "float32", ("plain", "decode 8")
# The same weights, with keys and values in 8 bits.
ROUNDED = "float32, K/V int8"


def kinds(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """A float32 model with each kind of weights, and why this machine has not the other kinds."""
    plain = dkv.unpack(copy.deepcopy(model))
    missing = {"bfloat16": why_not_packed(torch.bfloat16), "int8": why_not_int8()}
    made = {FULL: model, ROUNDED: model}
    if missing["bfloat16"] is None:
        made["bfloat16"] = pack_(copy.deepcopy(plain).to(torch.bfloat16))
    if missing["int8"] is None:
        made["int8"] = pack_(plain, Int8Linear)
    return made, {name: why for name, why in missing.items() if why is not None}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, packed or not."""
    packed = (module for module in model.modules() if isinstance(module, PackedProduct))
    return sum(p.nbytes for p in model.parameters()) + sum(module.packed_bytes for module in packed)


def measure(options: Options) -> dict[str, Any]:
    """Every kind of weights with every policy, in turn.

    Returns:
        rows: one per policy and kind, with weight_mb; seconds (of every round), tokens_per_second (the median), over
        (the median of float32's seconds over its own, by round), and same_tokens (share of tokens equal to those of
        float32; of random weights it means little).
        steps: one per kind, with its milliseconds in a cached step half-way, by part (medians of 25, in turn).
        missing: kinds that this machine has not, and why.

    Raises:
        ValueError: the model is not float32 on a CPU.
    """
    if options.model.dtype != torch.float32 or options.model.device.type != "cpu":
        raise ValueError(f"--weights is of float32 models on a CPU, not of {options.model.dtype} on this device")
    policies = POLICIES if options.policies == COMPARED else options.policies
    models, missing = kinds(options.model)
    ids = options.prompts()

    def run(kind: str, policy: str) -> tuple[float, Any]:
        settings = {**of_lineup(policy).settings, "max_new_tokens": options.new, "steps": options.steps, "seed": 0}
        settings["kv_cache_dtype"] = "int8" if kind == ROUNDED else "auto"
        return timed(partial(dkv.generate, models[kind], ids, **settings), ids.device)

    keys = [(policy, kind) for policy in policies for kind in models]
    calls = {(policy, kind): partial(run, kind, policy) for policy, kind in keys}
    with Bar(len(calls) * (1 + options.rounds), "run") as bar:
        for call in calls.values():
            call()
            bar.update()
        found = in_turn(calls, options.rounds, bar, lambda _, key: f"{key[1]}, {key[0]}")
    rows = [_row(options, key, models[key[1]], found) for key in keys]
    return {"rows": rows, "steps": _steps(options, models), "missing": missing}


@torch.no_grad()
def _steps(options: Options, models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Where the time of a cached step goes, by kind of weights.

    Each is taken once before, so that caches hold of its weights what they hold in a generation.
    """

    def taken(model: nn.Module, half_way: HalfWay) -> dict[str, float]:
        half_way.seconds()
        return by_part(model, half_way)

    ways = {kind: replace(options, model=model) for kind, model in models.items() if kind != ROUNDED}
    settings = of_lineup(STEPS["cached"]).settings
    calls = {kind: partial(taken, way.model, HalfWay(way, settings)) for kind, way in ways.items()}
    with Bar(len(calls) * ROUNDS, "step") as bar:
        found = in_turn(calls, ROUNDS, bar, lambda _, kind: kind)
    return [
        {"weights": kind} | {part: 1e3 * statistics.median(one[part] for one in steps) for part in PARTS}
        for kind, steps in found.items()
    ]


def _row(options: Options, key: tuple[str, str], model: nn.Module, found: dict[Any, list[Any]]) -> dict[str, Any]:
    policy, kind = key
    seconds, full = ([taken for taken, _ in found[policy, name]] for name in (kind, FULL))
    mine, theirs = (found[policy, name][0][1].sequences[:, -options.new :] for name in (kind, FULL))
    return {
        "policy": policy,
        "weights": kind,
        "batch": options.batch,
        "weight_mb": weight_bytes(model) / 2**20,
        "seconds": seconds,
        "tokens_per_second": mine.numel() / statistics.median(seconds),
        "over": statistics.median(whole / own for whole, own in zip(full, seconds, strict=True)),
        "same_tokens": (mine == theirs).double().mean().item(),
    }


def table(found: dict[str, Any]) -> str:
    """A line for each policy and kind."""
    heads = ("policy", "weights", "MiB", "batch", "tokens/s", "over float32", "same tokens")
    cells = [
        (
            *(row["policy"], row["weights"], f"{row['weight_mb']:.0f}", str(row["batch"])),
            *(f"{row['tokens_per_second']:.1f}", f"{row['over']:.2f}x", f"{row['same_tokens']:.0%}"),
        )
        for row in found["rows"]
    ]
    parts = [(part, *(f"{step[part]:.2f}" for step in found["steps"])) for part in PARTS]
    steps = columns(("ms of a cached step", *(step["weights"] for step in found["steps"])), parts)
    return "\n".join(
        [columns(heads, cells), *(f"no {kind}: {why}" for kind, why in found["missing"].items()), "", steps]
    )
