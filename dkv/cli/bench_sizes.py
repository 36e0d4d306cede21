"""Which sizes `dkv bench` can measure: found out before anything is measured, if possible before a model is made."""

import argparse
from collections.abc import Iterable
from typing import Any

# Which of the options of size and choice a measurement goes by; others it would pass over in silence.
USES = {
    "comparison": ("prompt", "new", "steps", "rounds", "policies", "no_eager"),
    "floor": ("prompt", "new", "no_eager"),
    "growth": ("prompt",),
    "memory": ("prompt", "new", "steps", "policies", "no_eager"),
    "blocks": ("prompt", "new", "rounds", "no_eager"),
}
# Of --new: what it must be a multiple of (`BLOCK` of `dkv.bench.speed.blocks`), and the least, which has a cached step.
MULTIPLE, LEAST = {"blocks": 32}, {"floor": 3}
# Slots where --new does not say, of tiny and of all others.
NEW = (64, 128)


def check_sizes(args: argparse.Namespace, kinds: list[str]) -> None:
    """Numbers that are impossible together, and options that none of the measurements goes by."""
    used = {name for kind in kinds for name in USES[kind]}
    for name in USES["comparison"]:
        if getattr(args, name) and name not in used:
            own = " and ".join(f"--{kind}" for kind in kinds)
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {own}: leave it out")
    on_tiny = args.shape is None and args.model in (None, "tiny")
    new = args.new or NEW[0 if on_tiny else 1]
    for kind in kinds:
        part, least = MULTIPLE.get(kind, 1), LEAST.get(kind, 1)
        if new % part:
            near = max(new // part, 1) * part
            near = near + part if on_tiny and near < NEW[0] else near
            raise ValueError(
                f"--{kind} fills blocks of {part} slots: --new must be a multiple of {part}, such as {near}, got {new}"
            )
        if new < least:
            raise ValueError(f"--{kind} needs a step that reuses the cache: --new must be at least {least}, got {new}")
        if kind == "blocks" and args.batch not in (None, [1]):
            raise ValueError(f"--blocks takes one prompt, as published: --batch must be 1, got {args.batch[0]}")
    if args.steps is not None and args.steps > new and "new" in used:
        raise ValueError(f"--steps must be at most --new, as every step fills a slot, got {args.steps} steps for {new}")


def check_room(kinds: Iterable[str], options: Any) -> None:
    """Raise ValueError where a measurement needs a longer canvas than the model has."""
    from dkv.bench.speed.growth import LENGTHS

    most = options.model.spec.max_positions
    for kind in kinds:
        new = LENGTHS[0] if kind == "growth" else options.new
        if options.prompt + new > most:
            raise ValueError(
                f"a prompt of {options.prompt} tokens and {new} new slots need {options.prompt + new} positions, and "
                f"{options.name} has {most}: give a smaller --prompt{' or --new' if kind != 'growth' else ''}"
            )
