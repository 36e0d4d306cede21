"""The families of 2026 against their published loops in eager PyTorch, on the same random weights.

    python -m dkv.bench.speed.families --prompt 128 --new 128
    python -m dkv.bench.speed.families "blocks of 32" --new 512

A line for every way in which dkv generates; of the loop there is one for the line and those below it, which takes its
turn in the same rounds. What is not exact has other tokens than the loop.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dkv
from dkv.bench import report
from dkv.bench.baselines import families
from dkv.bench.machine import facts
from dkv.bench.shapes import SHAPES, as_loaded, of_family, random_model, shape
from dkv.bench.timing import in_turn, timed
from dkv.common import files
from dkv.models import ModelSpec

Settings = dict[str, Any]
# Slots of the runs before the first round, which are not timed.
FIRST = 32


@dataclass(frozen=True)
class Case:
    """A published loop, and what dkv does in its place.

    Attributes:
        shape: in `dkv.bench.shapes.FAMILIES`.
        settings: of both.
        per_pass: tokens that a pass fills; None: as many as it is sure of, at least one.
        ways: by what the table calls it, what dkv is told beside; of the first one it has to give the loop's tokens.
    """

    shape: str
    settings: Settings = field(default_factory=dict)
    per_pass: int | None = None
    ways: dict[str, Settings] = field(default_factory=lambda: {"none": {}})


_DRAFTS = {"schedule": "speculative", "threshold": 0.0}
_INSIDE = {
    "none": {},
    "decode": {"cache": dkv.DecodeCache(None, warmup=1)},
    "dual, parts of 8": {"cache": "dual", "block_length": 8},
    "dual delayed, parts of 8": {"cache": dkv.DualCache(delayed=True), "block_length": 8},
}
CASES = {
    "LLaDA2.0": Case("llada2", per_pass=4),
    "LLaDA2.1, edits": Case("llada2", {"threshold": 0.7, "edit_threshold": 0.5}, 4),
    "SDAR": Case("sdar", per_pass=2),
    "SDAR-MoE": Case("sdar_moe", per_pass=2),
    "A2D, MDLM": Case("a2d, mdlm", {"block_length": 32, "quotas": "rounded"}, 4),
    "A2D, BD3LM": Case("a2d, bd3lm", {"block_length": 32, "quotas": "rounded"}, 4),
    "Fast-dLLM v2": Case("fast_dllm_v2", {"block_length": 8, "threshold": 0.9}),
    "Fast-dLLM v2, block cache": Case(
        "fast_dllm_v2", {"block_length": 8, "threshold": 0.9, "cache": "dual"}, ways={"dual": {}}
    ),
    "LLaDA-MoE": Case("llada_moe", {"block_length": 32}, 4),
    "Nemotron": Case("nemotron", {"threshold": 0.9}),
    "Nemotron, drafts": Case("nemotron", _DRAFTS),
    "blocks of 32": Case("llada2, dense", per_pass=4, ways=_INSIDE),
}


@dataclass(frozen=True)
class Run:
    """A generation: its seconds, tokens int64 [1, P + new], passes, and slots that these computed."""

    seconds: float
    tokens: Tensor
    passes: int
    slots: int


def measure(sizes: ModelSpec, names: Sequence[str], prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Every case in turn with its loop, one prompt at a time.

    Returns:
        {"rows": [...]}: `passes`, `slots` and `seconds` of dkv, and of the loop with `eager_` before the name; `speed`,
        of the loop's time and dkv's (medians, as are seconds, of ratios within a round); `same`: whether the tokens of
        all rounds are those of the loop, None where they need not be.
    """
    return {"rows": [row for name in names for row in _rows(name, sizes, prompt, new, rounds)]}


def _rows(name: str, sizes: ModelSpec, prompt: int, new: int, rounds: int) -> list[dict[str, Any]]:
    case, device = CASES[name], torch.device("cpu")
    plain = random_model(of_family(case.shape, sizes), device, torch.float32)
    model, draw = as_loaded(plain), torch.Generator().manual_seed(1)
    ids = torch.randint(sizes.vocab_size - 1, (1, prompt), generator=draw)
    ids += ids >= sizes.mask_token_id

    def settings(new: int) -> Settings:
        return case.settings | ({} if case.per_pass is None else {"steps": new // case.per_pass})

    def eager(new: int) -> Run:
        seconds, found = timed(partial(families.generate, plain, ids, new=new, **settings(new)), device)
        return Run(seconds, *found)

    def own(told: Settings, new: int) -> Run:
        call = {"max_new_tokens": new, "eos_token_id": [], **settings(new), **told}
        seconds, output = timed(lambda: dkv.generate(model, ids, **call), device)
        return Run(seconds, output.sequences, output.stats.passes, output.stats.computed_slots)

    calls = {"loop": eager, **{way: partial(own, told) for way, told in case.ways.items()}}
    for call in calls.values():
        call(min(new, FIRST))
    calls = {way: partial(call, new) for way, call in calls.items()}
    found = in_turn(calls, rounds)
    loop, rows = found.pop("loop"), []
    for number, (way, runs) in enumerate(found.items()):
        row = {"family": name, "policy": way, "prompt": prompt, "new": new, **_of(runs)}
        row |= {f"eager_{key}": value for key, value in _of(loop).items()}
        row["speed"] = statistics.median(a.seconds / b.seconds for a, b in zip(loop, runs, strict=True))
        pairs = zip(loop, runs, strict=True)
        row["same"] = all(torch.equal(a.tokens, b.tokens) for a, b in pairs) if number == 0 else None
        rows.append(row)
    return rows


def _of(runs: list[Run]) -> dict[str, Any]:
    return {
        "passes": runs[0].passes,
        "slots": runs[0].slots,
        "seconds": statistics.median(run.seconds for run in runs),
    }


CELLS = {
    "family": "{family}",
    "policy": "{policy}",
    "passes": "{passes}",
    "slots": "{slots}",
    "s": "{seconds:.2f}",
    "loop's passes": "{eager_passes}",
    "slots ": "{eager_slots}",
    "s ": "{eager_seconds:.2f}",
    "speed": "{speed:.2f}x",
    "same": lambda row: {None: "", True: "yes", False: "NO"}[row["same"]],
}


def table(found: dict[str, Any]) -> str:
    """A line for every way to generate."""
    return report.table(found["rows"], CELLS, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--shape", choices=SHAPES, default="d512x8", help="whose sizes the models have")
    for name, default in {"prompt": 128, "new": 128, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    asked = parser.parse_args()
    if odd := [name for name in asked.families if name not in CASES]:
        parser.error(f"unknown family {odd[0]!r}; known are {', '.join(CASES)}")
    known = facts(torch.device("cpu"), shlex.join(["python", "-m", "dkv.bench.speed.families", *sys.argv[1:]]))
    found = measure(shape(asked.shape), asked.families or list(CASES), asked.prompt, asked.new, asked.rounds)
    print(table(found))
    if asked.json is not None:
        files.write_json(asked.json, {"facts": known | {"model": asked.shape}, "families": found}, indent=1)


if __name__ == "__main__":
    main()
