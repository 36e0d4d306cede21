"""What the arguments of `dkv bench` may be."""

import argparse
from typing import Any

from dkv.bench.lineup import ALL, COMPARED, IN_BLOCKS, SERVED
from dkv.cli.measuring import check_counts
from dkv.common import files

# Measurements that can take the place of the comparison.
OTHERS = {
    "floor": "a full and a cached step against their matrix products alone, by part",
    "mass": "what it costs to observe a pass: the attention that slots get, of all layers",
    "weights": "bfloat16 and int8 weights on a CPU against packed float32, with plain decoding and Decode(8)",
    "growth": "time per generated slot for 64 to 2048 new slots, with the fitted exponents",
    "memory": "peak memory of a step against weights and buffer",
    "blocks": "block policies and a threshold (Fast-dLLM), one prompt at a time",
    "serve": "requests that arrive at random: rows that are joined (dkv.LLM) against static batches",
}
# Which of the options of size and choice a measurement goes by; others it would pass over in silence.
USES = {
    "comparison": ("prompt", "new", "steps", "rounds", "policies", "no_eager"),
    "floor": ("prompt", "new", "no_eager"),
    "mass": ("prompt", "new"),
    "weights": ("prompt", "new", "steps", "rounds", "policies"),
    "growth": ("prompt",),
    "memory": ("prompt", "new", "steps", "policies", "no_eager"),
    "blocks": ("prompt", "new", "rounds", "policies", "no_eager"),
    "serve": ("prompt", "new", "rounds", "policies"),
}
# Of --new: what it must be a multiple of (`BLOCK` of `dkv.bench.speed.blocks`), and the least, which has a cached step.
MULTIPLE, LEAST = {"blocks": 32}, {"floor": 3, "mass": 3, "weights": 3}
# By measurement, the names that --policies takes, and how many rows there are by default.
POLICIES = {"blocks": IN_BLOCKS, "serve": SERVED}
NAMES = tuple(dict.fromkeys((*COMPARED, *IN_BLOCKS, *SERVED)))
BATCHES = {"serve": 8}
# Slots where --new does not say, of tiny and of all others.
NEW = (64, 128)
# Options that go into `dkv.bench.options.Options` as they are.
SETTINGS = ("prompt", "new", "steps", "rounds")


def check(args: argparse.Namespace) -> None:
    """Find what is wrong with the arguments before anything heavy is imported or measured.

    Raises:
        ValueError: a number too small, options that exclude each other, an output that cannot be written.
    """
    others = [name for name in OTHERS if getattr(args, name)]
    check_counts(args, (*SETTINGS, "batch", "layers", "threads"))
    if args.all != (args.out is not None):
        raise ValueError("--all writes files: give --out DIR" if args.all else "--out goes with --all")
    if args.all:
        for name in (*SETTINGS, "batch", "policies", "no_eager", "json", "csv", "plots", *OTHERS):
            if getattr(args, name):
                raise ValueError(f"--all has sizes and outputs of its own: leave out --{name.replace('_', '-')}")
        if args.model == "tiny":
            raise ValueError("--all needs longer canvases than tiny has: give --shape or another --model")
    if args.model is not None and args.shape is not None:
        raise ValueError("give --model or --shape, not both")
    if args.layers is not None and args.shape is None:
        raise ValueError("--layers goes with --shape: a checkpoint has its own")
    if args.prompt is not None and args.model in (None, "tiny") and args.shape is None:
        raise ValueError("--prompt goes with --shape or another --model: tiny has problems of its own as prompts")
    if others and args.batch is not None and len(args.batch) > 1:
        raise ValueError(f"--{others[0]} takes one --batch, got {len(args.batch)}")
    if args.csv is not None and len(others) > 1:
        raise ValueError("--csv holds the rows of one measurement: give one, or --json")
    if not args.all:
        _check_sizes(args, others or ["comparison"])
    _check_outputs(args)


def _check_sizes(args: argparse.Namespace, kinds: list[str]) -> None:
    """Numbers that are impossible together, and options that none of the measurements goes by."""
    used = {name for kind in kinds for name in USES[kind]}
    for name in USES["comparison"]:
        if getattr(args, name) and name not in used:
            own = " and ".join(f"--{kind}" for kind in kinds)
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {own}: leave it out")
    for kind in kinds:
        known = POLICIES.get(kind, COMPARED)
        if "policies" in USES[kind] and (odd := [name for name in args.policies or () if name not in known]):
            raise ValueError(f"--policies {odd[0]!r} is not among what is compared here: {', '.join(known)}")
    on_tiny = args.shape is None and args.model in (None, "tiny")
    new = args.new or NEW[0 if on_tiny else 1]
    for kind in kinds:
        part, least = MULTIPLE.get(kind, 1), LEAST.get(kind, 1)
        if new % part:
            near = max(new // part, 1) * part
            near = near + part if on_tiny and near < NEW[0] else near
            wrong = f"--new must be a multiple of {part}, such as {near}, got {new}"
            raise ValueError(f"--{kind} fills blocks of {part} slots: {wrong}")
        if new < least:
            raise ValueError(f"--{kind} needs a step that reuses the cache: --new must be at least {least}, got {new}")
        if kind == "blocks" and args.batch not in (None, [1]):
            raise ValueError(f"--blocks takes one prompt, as published: --batch must be 1, got {args.batch[0]}")
    if args.steps is not None and args.steps > new and "new" in used:
        raise ValueError(f"--steps must be at most --new, as every step fills a slot, got {args.steps} steps for {new}")


def check_room(kind: str, options: Any) -> None:
    """Raise ValueError where a measurement needs a longer canvas than the model has."""
    from dkv.bench.speed.growth import LENGTHS

    new, most = LENGTHS[0] if kind == "growth" else options.new, options.model.spec.max_positions
    if options.prompt + new > most:
        raise ValueError(
            f"a prompt of {options.prompt} tokens and {new} new slots need {options.prompt + new} positions, and "
            f"{options.name} has {most}: give a smaller --prompt{' or --new' if kind != 'growth' else ''}"
        )


def _check_outputs(args: argparse.Namespace) -> None:
    from dkv.bench.plots import FIGURES, check_installed

    outputs = [("--json", args.json), ("--csv", args.csv)]
    if args.plots is not None:
        check_installed("--plots")
        outputs += [("--plots", args.plots / f"{figure}.png") for figure in FIGURES]
    if args.out is not None:
        check_installed("--all")
        outputs += [("--out", args.out / f"{name}.json") for name in ALL]
        outputs += [("--out", args.out / f"{name}_{figure}.png") for name in ALL for figure in FIGURES]
    files.check_outputs(outputs)
