"""What commands that measure share: options of the machine, and what is checked and said beforehand."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# The names of `dkv.models.bundled.tasks.TASKS`, which help is to tell without importing torch.
TASK_NAMES = ("balance", "addition", "cells")
# What each bundled model was trained on.
TASKS_OF = {
    "tiny": TASK_NAMES,
    "tiny-dream": TASK_NAMES,
    "tiny-block": TASK_NAMES,
    "tiny-long": ("long-balance", "long-cells"),
    "tiny-text": ("stories", "words"),
}
# What is asked for beyond is a slip: it would take for ever, or all memory, before it fails.
MOST = {"problems": 1 << 16, "batch": 1 << 12, "layers": 1 << 10, "threads": 1 << 10, "rounds": 1 << 16}
MOST_SLOTS = 1 << 20
DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_machine(parser: argparse.ArgumentParser) -> Any:
    """Add the options of threads, device and dtype; returns the `add_argument` of their group."""
    add = parser.add_argument_group("machine").add_argument
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--device", help="such as cpu or cuda:1 (default: the current GPU, or else cpu)")
    known = f"{', '.join(DTYPES)} (default: that of the checkpoint; on a CPU float32)"
    add("--dtype", choices=DTYPES, metavar="NAME", help=known)
    return add


def add_json(add: Any) -> None:
    """Add the option of a file with all figures."""
    what = "also write all figures, with the machine and the command; - for standard output"
    add("--json", type=Path, metavar="FILE", help=what)


def show(path: Path, tables: Callable[[dict[str, Any]], list[str]]) -> int:
    """Print once more what a command that measures has written, by the `tables` of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    from dkv.bench import report

    if not path.is_file():
        raise FileNotFoundError(f"--show: there is no file {path}")
    try:
        found = json.loads(path.read_text("utf-8"))
        lines = [report.machine_line(found["facts"]), *tables(found)]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"--show: {path} has no figures of this command, or those of another version: give a file that it wrote, "
            "or measure anew"
        ) from error
    print(*lines, sep="\n")
    return 0


def check_counts(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise ValueError if one of the numbers that are given is below 1, or beyond what anything here can do."""
    for name in names:
        value, most = getattr(args, name), MOST.get(name, MOST_SLOTS)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not 1 <= number <= most:
                bound = "least 1" if number < 1 else f"most {most}"
                raise ValueError(f"--{name.replace('_', '-')} must be at {bound}, got {number}")


def ready(args: argparse.Namespace) -> None:
    """Say so if the machine is busy, and set the number of threads."""
    from dkv.bench.machine import warn_if_busy

    warn_if_busy(f"dkv {args.command}")
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
