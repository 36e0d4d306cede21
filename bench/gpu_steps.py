"""Part `steps`: whole generations of models of random weights, by policy and backend."""

import gc
import statistics
from collections.abc import Iterator
from typing import Any

import torch

import dkv
from dkv import kernels
from dkv.bench.gpu_report import Clock, Report, must_answer, short
from dkv.bench.gpu_work import BATCHES, SLOTS, TITLES
from dkv.bench.shapes import random_model
from dkv.models import ModelSpec, Transformer

# Greedy goes with the random order, as published; all others with the most probable slot first.
LINEUP: dict[str, dict[str, Any]] = {
    "plain": {},
    "decode 8": {"cache": dkv.DecodeCache(8)},
    "greedy 4": {"cache": dkv.GreedyCache(4, 4), "confidence": "random"},
    "prefill": {"cache": dkv.PrefillCache()},
}
ROUNDS = 2

# Of a run: its seconds, its statistics and the most memory it held.
Run = tuple[float, dkv.Stats, float]


def _configurations(tiny: bool) -> Iterator[tuple[int, int, int]]:
    """(batch, slots, new tokens); on average half of the new tokens are masked."""
    slots, batches, new = ((48,), (1, 2), 8) if tiny else (SLOTS, BATCHES, 64)
    return ((b, s, new) for s in slots for b in batches)


def _once(model: Transformer, ids: torch.Tensor, new: int, backend: str, settings: dict[str, Any]) -> Run:
    gpu = model.device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    with kernels.use_backend(backend):
        stats = dkv.generate(model, ids, max_new_tokens=new, schedule="blocks", seed=0, **settings).stats
    return stats.seconds, stats, torch.cuda.max_memory_allocated(model.device) / 1e9 if gpu else 0.0


def _values(label: str, policy: str, backend: str, runs: list[Run], plain: list[Run] | None) -> dict[str, Any]:
    """One row as it is written. The first run compiled and warmed up, and counts only where it is the only one."""
    timed = runs[1:] or runs
    seconds = [run[0] for run in timed]
    typical, stats = statistics.median(seconds), timed[-1][1]
    values = {
        "name": f"{label} {policy}", "policy": policy, "backend": backend, "runs": len(timed),
        "warm": len(runs) > 1, "seconds": seconds, "ms_per_step": typical / stats.passes * 1e3,
        "tokens_per_second": stats.new_tokens / typical, "peak_gb": timed[-1][2],
        "computed_share": stats.computed_share, "passes": stats.passes, "full_passes": stats.full_passes,
    }  # fmt: skip
    if plain:
        reference = plain[1:] or plain
        values["ratio_to_plain"] = statistics.median(a[0] / b[0] for a, b in zip(reference, timed, strict=False))
    return values


def _line(values: dict[str, Any]) -> str:
    ratio = f"{values['ratio_to_plain']:8.2f}x" if "ratio_to_plain" in values else f"{'-':>9}"
    note = "" if values["warm"] else "  first run, compilation included"
    return (
        f"{values['name']:36} {values['backend']:9} {values['ms_per_step']:9.2f} {values['tokens_per_second']:9.1f} "
        f"{ratio} {values['computed_share']:9.0%} {values['peak_gb']:8.2f}{note}"
    )


def _configuration(
    report: Report, clock: Clock, model: Transformer, label: str, ids: torch.Tensor, new: int,
    contenders: list[tuple[str, str]],
) -> list[str]:  # fmt: skip
    """Run and report every (policy, backend) on one batch, in turn; returns what was left out."""
    runs: dict[tuple[str, str], list[Run]] = {}
    errors: dict[tuple[str, str], str] = {}
    for number in range(ROUNDS + 1):
        for key in contenders:
            policy, backend = key
            # A round that was begun is finished for those that ratios are taken of.
            if key in errors or (clock.over and (number > 0 or runs)):
                continue
            try:
                runs.setdefault(key, []).append(_once(model, ids, new, backend, LINEUP[policy]))
            except Exception as error:
                errors[key] = short(error)
                must_answer(model.device, f"{label} {policy} on {backend}")
    for key in contenders:
        policy, backend = key
        if key in errors:
            values = {"name": f"{label} {policy}", "backend": backend, "error": errors[key]}
            line = f"{values['name']:36} {backend:9} {errors[key]}"
            report.row(line, values, failed="OutOfMemory" not in errors[key])
        elif key in runs:
            values = _values(label, policy, backend, runs[key], runs.get(("plain", backend)))
            report.row(_line(values), values)
    return [
        f"{label} {policy} on {backend}" for policy, backend in contenders if (policy, backend) not in runs | errors
    ]


def run(
    report: Report, clock: Clock, device: torch.device, backends: list[str], specs: dict[str, ModelSpec], tiny: bool,
    only: str,
) -> None:  # fmt: skip
    """Time generations whose name contains `only` until the clock is over."""
    report.begin("steps", "whole generations, one token per row and step; ratio: plain / own time, same backend")
    print(
        f"{'model, batch, slots, policy':36} {'backend':9} {'ms/step':>9} {'tokens/s':>9} {'to plain':>9} "
        f"{'computed':>9} {'peak GB':>8}"
    )
    left_out: list[str] = []
    for family, spec in specs.items():
        # Each model has its share of the time that is left.
        share = Clock(0)
        share.limit = (clock.limit - clock.spent) / (len(specs) - list(specs).index(family))
        model = random_model(spec, device, torch.float32 if tiny else torch.bfloat16)
        for batch, slots, new in _configurations(tiny):
            label = f"{TITLES[family]} B{batch} S{slots}"
            wanted = [policy for policy in LINEUP if only.lower() in f"{label} {policy}".lower()]
            if not wanted:
                continue
            # Plain decoding is what the others are compared with.
            contenders = [(policy, backend) for policy in dict.fromkeys(["plain", *wanted]) for backend in backends]
            ids = torch.randint(spec.mask_token_id, (batch, slots - new), device=device)
            if share.over:
                left_out += [f"{label} {policy} on {backend}" for policy, backend in contenders]
                continue
            left_out += _configuration(report, share, model, label, ids, new, contenders)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.end(clock, left_out)
