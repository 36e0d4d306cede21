"""Part `steps`: whole generations of models of random weights, by policy and backend."""

import gc
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

import dkv
from dkv import kernels
from dkv.bench.contenders import of_lineup
from dkv.bench.gpu.ops import BATCHES, SLOTS, TITLES
from dkv.bench.gpu.report import Clock, Report, must_answer, short
from dkv.bench.lineup import ON_GPU, PLAIN
from dkv.bench.report import aligned, shown
from dkv.bench.shapes import random_model
from dkv.bench.timing import in_turn
from dkv.models import ModelSpec, Transformer

ROUNDS = 2
# What is printed as it comes, in columns of fixed widths.
HEADER = ("model, batch, slots, policy", "backend", "ms/step", "tokens/s", "to plain", "computed", "peak GB", "")
WIDTHS = (36, 9, 9, 9, 9, 9, 8, 0)


def _once(
    model: Transformer, ids: torch.Tensor, new: int, backend: str, settings: dict[str, Any]
) -> tuple[dkv.Stats, float]:
    """What a generation cost, and the most gigabytes that it held."""
    gpu = model.device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    with kernels.use_backend(backend):
        stats = dkv.generate(model, ids, max_new_tokens=new, schedule="blocks", seed=0, **settings).stats
    return stats, torch.cuda.max_memory_allocated(model.device) / 1e9 if gpu else 0.0


def _values(label: str, policy: str, backend: str, runs: list, plain: list) -> dict[str, Any]:
    """A result as it is written. The first run compiled and warmed up, and counts only where it is the only one."""
    timed, against = runs[1:] or runs, plain[1:] or plain
    seconds, (stats, peak) = [stats.seconds for stats, _ in timed], timed[-1]
    typical = statistics.median(seconds)
    values = {"name": f"{label} {policy}", "policy": policy, "backend": backend, "runs": len(timed)}
    values |= {"warm": len(runs) > 1, "seconds": seconds, "ms_per_step": typical / stats.passes * 1e3}
    values |= {"tokens_per_second": stats.new_tokens / typical, "peak_gb": peak}
    values |= {name: getattr(stats, name) for name in ("computed_share", "passes", "full_passes")}
    if plain:
        ratios = [a.seconds / b.seconds for (a, _), (b, _) in zip(against, timed, strict=False)]
        values["ratio_to_plain"] = statistics.median(ratios)
    return values


def _line(values: dict[str, Any]) -> str:
    numbers = [f"{values['ms_per_step']:.2f}", f"{values['tokens_per_second']:.1f}"]
    numbers += [shown(values.get("ratio_to_plain"), "{:.2f}x") or "-", f"{values['computed_share']:.0%}"]
    note = "" if values["warm"] else "  first run, compilation included"
    return aligned([values["name"], values["backend"], *numbers, f"{values['peak_gb']:.2f}", note], WIDTHS, left=2)


def _configuration(
    report: Report,
    clock: Clock,
    label: str,
    device: torch.device,
    contenders: dict[tuple[str, str], Callable[[], Any]],
) -> list[str]:
    """Run and report every (policy, backend) on one batch, in turn; returns what was left out."""
    errors: dict[tuple[str, str], str] = {}
    begun: list[tuple[str, str]] = []

    def attempt(key: tuple[str, str], call: Callable[[], Any]) -> Any:
        # A first round that was begun is finished for those that ratios are taken of.
        if key in errors or (clock.over and begun):
            return None
        begun.append(key)
        try:
            return call()
        except Exception as error:
            errors[key] = short(error)
            must_answer(device, f"{label} {key[0]} on {key[1]}")

    tried = in_turn({key: partial(attempt, key, call) for key, call in contenders.items()}, ROUNDS + 1)
    runs = {key: [run for run in found if run is not None] for key, found in tried.items()}
    for key in contenders:
        policy, backend = key
        if key in errors:
            values = {"name": f"{label} {policy}", "backend": backend, "error": errors[key]}
            line = aligned([values["name"], backend, errors[key]], (*WIDTHS[:2], 0), left=3)
            report.row(line, values, failed="OutOfMemory" not in errors[key])
        elif runs[key]:
            values = _values(label, policy, backend, runs[key], runs[PLAIN, backend])
            report.row(_line(values), values)
    return [f"{label} {policy} on {backend}" for policy, backend in contenders if (policy, backend) not in begun]


def run(
    report: Report,
    clock: Clock,
    device: torch.device,
    backends: list[str],
    specs: dict[str, ModelSpec],
    tiny: bool,
    only: str,
) -> None:
    """Time generations whose name contains `only` until the clock is over."""
    report.begin("steps", "whole generations, one token per row and step; ratio: plain / own time, same backend")
    print(aligned(HEADER, WIDTHS, left=2))
    left_out: list[str] = []
    # On average half of the new tokens are masked.
    all_slots, batches, new = ((48,), (1, 2), 8) if tiny else (SLOTS, BATCHES, 64)
    for number, (family, spec) in enumerate(specs.items()):
        # Each model has its share of the time that is left.
        share = Clock((clock.limit - clock.spent) / 60 / (len(specs) - number))
        model = random_model(spec, device, torch.float32 if tiny else torch.bfloat16)
        for slots, batch in product(all_slots, batches):
            label = f"{TITLES[family]} B{batch} S{slots}"
            wanted = [policy for policy in ON_GPU if only.lower() in f"{label} {policy}".lower()]
            if not wanted:
                continue
            ids = torch.randint(spec.mask_token_id, (batch, slots - new), device=device)
            # Plain decoding is what the others are compared with.
            contenders = {
                (policy, backend): partial(_once, model, ids, new, backend, of_lineup(policy).settings)
                for policy in dict.fromkeys([PLAIN, *wanted])
                for backend in backends
            }
            if share.over:
                left_out += [f"{label} {policy} on {backend}" for policy, backend in contenders]
            else:
                left_out += _configuration(report, share, label, device, contenders)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.end(clock, left_out)
