"""What commands that examine a model share: its problems, where they come from, and what is checked beforehand."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dkv.cli.measuring import TASKS_OF

ALL_TASKS = tuple(dict.fromkeys(name for names in TASKS_OF.values() for name in names))


def add_problems(add: Any) -> None:
    """Add the options of a model and its problems."""
    models = f"{', '.join(TASKS_OF)}, a checkpoint folder or a hub id (default: %(default)s)"
    add("--model", default="tiny", help=models)
    known = f"tasks of the bundled models: {', '.join(ALL_TASKS)} (default: those of the model)"
    add("--tasks", nargs="+", choices=ALL_TASKS, metavar="NAME", help=known)
    add("--data", type=Path, metavar="FILE", help="problems of your own, as JSON lines")
    add("--new-tokens", type=int, metavar="N", help="slots for an answer of --data")
    add("--chat", action="store_true", help="put prompts of --data into the tokenizer's chat template")
    what = "problems per task (default: 96, of tiny-text 8 passages; of --data all)"
    add("--problems", type=int, metavar="N", help=what)
    add("--seed", type=int, default=1, metavar="N", help="of problems and random numbers (default: %(default)s)")


def check_problems(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError where the options of `add_problems` do not go together."""
    if args.data is None:
        for name in ("new_tokens", "chat"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} goes with --data: the bundled tasks have their own")
        own = TASKS_OF.get(args.model)
        if own is None and args.tasks is None:
            raise ValueError(f"--model {args.model} was not trained on the bundled tasks: give --data FILE, or --tasks")
        if odd := [task for task in args.tasks or () if task not in (own or ALL_TASKS)]:
            raise ValueError(f"--tasks {odd[0]} is none of {args.model}, which has {', '.join(own)}")
    else:
        if args.tasks is not None:
            raise ValueError("give --data or --tasks, not both")
        if args.new_tokens is None:
            raise ValueError("--data needs --new-tokens N: the slots that an answer gets")
        if not args.data.is_file():
            raise FileNotFoundError(f"--data: there is no file {args.data}")


def loaded(args: argparse.Namespace) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    """The model, its tokenizer, the problems, and the facts of the measurement."""
    import dkv
    from dkv.bench import machine
    from dkv.bench.problems import bundled, from_file

    if args.data is not None:
        problems = from_file(args.data, args.new_tokens, args.problems)
    else:
        problems = bundled(dict.fromkeys(args.tasks or TASKS_OF[args.model]), args.problems, seed=args.seed)
    model = dkv.load(args.model, dtype=args.dtype, device=args.device)
    tokenizer = dkv.load_tokenizer(args.model)
    facts = machine.facts(model.device, args.command_line)
    facts |= {"model": args.model, "parameters": model.num_parameters, "batch": args.batch, "seed": args.seed}
    facts |= {"dtype": str(model.dtype).removeprefix("torch.")}
    facts |= {"problems": {family.name: len(family.prompts) for family in problems}}
    return model, tokenizer, problems, facts


def with_other_weights(args: argparse.Namespace, chosen: Sequence[Any]) -> dict[str, Any]:
    """The model with the weights that runs name, by their names."""
    import dkv
    from dkv.bench.contenders import WEIGHTS

    names = dict.fromkeys(contender.weights for contender in chosen if contender.weights is not None)
    return {name: dkv.load(args.model, device=args.device, **WEIGHTS[name]) for name in names}


def check_contenders(model: Any, chosen: Sequence[Any]) -> None:
    """Raise ValueError where a run does not go with the model: before hours of work, not in the middle of them."""
    from dkv.engine.config import DiffusionConfig
    from dkv.engine.inputs import check_settings

    for contender in chosen:
        check_settings(model, DiffusionConfig(**contender.settings))
