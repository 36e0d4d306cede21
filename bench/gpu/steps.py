"""Part `steps`: whole generations of models of random weights, by policy and backend."""

import gc
import statistics
from functools import partial
from itertools import product
from typing import Any

import torch

import dkv
from dkv import kernels
from dkv.bench.contenders import of_lineup
from dkv.bench.gpu.ops import BATCHES, SLOTS, TITLES
from dkv.bench.gpu.report import Report, must_answer, short
from dkv.bench.gpu.tools import variable
from dkv.bench.lineup import ON_GPU, PLAIN
from dkv.bench.report import fixed
from dkv.bench.shapes import random_model
from dkv.bench.timing import in_turn
from dkv.models import ModelSpec, Transformer
from dkv.models.joining import join_

ROUNDS = 2
# In place of a backend: the Triton kernels, each step launched as it comes.
STEPWISE = "stepwise"
COLUMNS = {
    "model, batch, slots, policy": (36, "{name}"),
    "backend": (9, "{backend}"),
    "ms/step": (9, "{ms_per_step:.2f}"),
    "tokens/s": (9, "{tokens_per_second:.1f}"),
    "to plain": (9, lambda values: f"{values['ratio_to_plain']:.2f}x" if "ratio_to_plain" in values else "-"),
    "computed": (9, "{computed_share:.0%}"),
    "peak GB": (8, "{peak_gb:.2f}"),
    "replayed": (9, "{replayed_passes}"),
    "": (0, lambda values: "" if values["warm"] else "  first run, compilation included"),
}
COUNTS = ("computed_share", "passes", "full_passes", "replayed_passes")
FAILED = dict(list(COLUMNS.items())[:2]) | {"": (0, "{error}")}


def _once(model: Transformer, ids: torch.Tensor, new: int, policy: str, backend: str) -> tuple[dkv.Stats, float]:
    """What a generation cost, and the most gigabytes that it held; `STEPWISE` is Triton without graphs."""
    gpu, settings = model.device.type == "cuda", of_lineup(policy).settings
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    stepwise = backend == STEPWISE
    with kernels.use_backend("triton" if stepwise else backend), variable("DKV_GRAPHS", str(int(not stepwise))):
        stats = dkv.generate(model, ids, max_new_tokens=new, schedule="blocks", seed=0, **settings).stats
    return stats, torch.cuda.max_memory_allocated(model.device) / 1e9 if gpu else 0.0


def _values(runs: list, plain: list) -> dict[str, Any]:
    """A result as it is written. The first run compiled and warmed up, and counts only where it is the only one."""
    timed, against = runs[1:] or runs, plain[1:] or plain
    seconds, (stats, peak) = [stats.seconds for stats, _ in timed], timed[-1]
    typical = statistics.median(seconds)
    values = {"runs": len(timed), "warm": len(runs) > 1, "seconds": seconds, "peak_gb": peak}
    values |= {"ms_per_step": typical / stats.passes * 1e3, "tokens_per_second": stats.new_tokens / typical}
    values |= {name: getattr(stats, name) for name in COUNTS}
    if plain:
        ratios = [a.seconds / b.seconds for (a, _), (b, _) in zip(against, timed, strict=False)]
        values["ratio_to_plain"] = statistics.median(ratios)
    return values


def _configuration(report: Report, until: float, label: str, contenders: dict, device: torch.device) -> None:
    """Run and report every (policy, backend) on one batch, in turn, while less than `until` seconds are spent."""
    errors: dict[tuple[str, str], str] = {}
    begun: set[tuple[str, str]] = set()

    def attempt(key: tuple[str, str]) -> Any:
        # A first round that was begun is finished for those that ratios are taken of.
        if key in errors or (report.spent >= until and begun):
            return None
        begun.add(key)
        try:
            return contenders[key]()
        except Exception as error:
            errors[key] = short(error)
            must_answer(device, f"{label} {key[0]} on {key[1]}")

    tried = in_turn({key: partial(attempt, key) for key in contenders}, ROUNDS + 1)
    runs = {key: [run for run in found if run is not None] for key, found in tried.items()}
    for policy, backend in contenders:
        values = {"name": f"{label} {policy}", "policy": policy, "backend": backend}
        if error := errors.get((policy, backend)):
            values = {"name": values["name"], "backend": backend, "error": error}
            report.row(fixed(FAILED, values, left=3), values, failed="OutOfMemory" not in error)
        elif runs[policy, backend]:
            values |= _values(runs[policy, backend], runs[PLAIN, backend])
            report.row(fixed(COLUMNS, values, left=2), values)
        else:
            report.left_out.append(f"{values['name']} on {backend}")


def run(report: Report, device: torch.device, backends: list[str], specs: dict[str, ModelSpec], tiny: bool) -> None:
    """Time the wanted generations until the time is over."""
    report.begin("steps", "whole generations, one token per row and step; ratio: plain / own time, same backend")
    print(fixed(COLUMNS, left=2))
    # On average half of the new tokens are masked.
    all_slots, batches, new = ((48,), (1, 2), 8) if tiny else (SLOTS, BATCHES, 64)
    for number, (family, spec) in enumerate(specs.items()):
        # Each model has its share of the time that is left.
        until = report.spent + (report.limit - report.spent) / (len(specs) - number)
        model = join_(random_model(spec, device, torch.float32 if tiny else torch.bfloat16))
        for slots, batch in product(all_slots, batches):
            label = f"{TITLES[family]} B{batch} S{slots}"
            wanted = [policy for policy in ON_GPU if report.wanted(f"{label} {policy}")]
            if not wanted:
                continue
            ids = torch.randint(spec.mask_token_id, (batch, slots - new), device=device)
            # Plain decoding is what the others are compared with.
            contenders = {
                (policy, backend): partial(_once, model, ids, new, policy, backend)
                for policy in dict.fromkeys([PLAIN, *wanted])
                for backend in [*backends, *([STEPWISE] if device.type == "cuda" and "triton" in backends else [])]
            }
            if report.spent >= until:
                report.left_out += [f"{label} {policy} on {backend}" for policy, backend in contenders]
            else:
                _configuration(report, until, label, contenders, device)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.end()
