"""`dkv bench`: which cache policy pays, and where the time goes."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dkv.bench.lineup import ALL, COMPARED, IN_BLOCKS, SERVED
from dkv.cli import bench_host
from dkv.cli.bench_checks import BATCHES, NAMES, OTHERS, SETTINGS, USES, check, check_room
from dkv.cli.measuring import add_json, add_machine, ready, show
from dkv.common import files, process

SUMMARY = "Measure the cache policies on this machine: speed, work, memory, and where the time of a step goes."

EXAMPLES = """\
examples:
  dkv bench                                                 the bundled model, with its exact answers
  dkv bench --shape d512x8 --policies plain 'decode 8'      a model of random weights
  dkv bench --shape llada-8b --layers 4 --prompt 896 --batch 1 4 8 --plots plots
  dkv bench --model GSAI-ML/LLaDA-8B-Instruct --no-eager --json result.json --csv result.csv
  dkv bench --shape d512x8 --floor --growth                 where a step's time goes, and how it grows
  dkv bench --serve --shape d512x8 --prompt 64              requests that come and go, against static batches
  dkv bench --host --shape dream-7b                         what the host starts in a step on a GPU
  dkv bench --all --out results                             everything, with plots: 12 minutes on 2 cores

Measure on an idle machine. Every round runs each policy once, in turn; speeds are ratios to plain
decoding in the same round, and figures are medians. "eager" is the method written in plain PyTorch
the way it was published, on the same weights (plain, Decode and Greedy in random order, LLaDA alone).
"""

# The names of `dkv.bench.shapes.SHAPES`, which imports torch.
SHAPES = ("d128x4", "d512x8", "llada-8b", "dream-7b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what").add_argument
    add("--model", metavar="MODEL", help="a bundled model, a checkpoint folder or a hub id (default: tiny)")
    add("--shape", choices=SHAPES, metavar="NAME", help=f"random weights in the shape of {', '.join(SHAPES)}")
    add("--layers", type=int, metavar="N", help="layers of the shape (default: as many as it has)")
    known = f"{', '.join(COMPARED)}; with --blocks {', '.join(IN_BLOCKS)} (default: all but rollout and elastic); "
    known += f"plain is always among them; with --serve {', '.join(SERVED)} (default: {SERVED[0]})"
    add("--policies", nargs="+", choices=NAMES, metavar="NAME", help=known)
    add("--no-eager", action="store_true", help="leave out the eager baseline")

    add = parser.add_argument_group("size").add_argument
    add("--prompt", type=int, metavar="N", help="tokens of a prompt (default: 128; tiny has prompts of its own)")
    add("--new", type=int, metavar="N", help="slots to fill (default: 128; tiny: 64)")
    add("--steps", type=int, metavar="N", help="passes (default: one per slot)")
    add("--batch", type=int, nargs="+", metavar="N", help="rows; several make a table each (default: 1; --serve: 8)")
    add("--rounds", type=int, metavar="N", help="timed runs of every policy (default: 3)")

    add_machine(parser)

    add = parser.add_argument_group("output").add_argument
    add_json(add)
    add("--csv", type=Path, metavar="FILE", help="also write the rows of the table")
    add("--plots", type=Path, metavar="DIR", help="also draw figures (needs matplotlib: pip install 'dkv[bench]')")

    add = parser.add_argument_group("other measurements, in place of the comparison").add_argument
    for name, what in OTHERS.items():
        add(f"--{name}", action="store_true", help=what)
    add("--all", action="store_true", help="the comparison at several sizes, and all others; needs --out")
    add("--out", type=Path, metavar="DIR", help="where --all writes its JSON and PNG files")
    add("--host", action="store_true", help="launches of a step on a GPU, by kind, and its host time, without one")
    add("--show", type=Path, metavar="FILE", help="print the tables of a JSON file again, and measure nothing")


def run(args: argparse.Namespace) -> int:
    if args.show is not None:
        return show(args.show, tables)
    if args.host:
        return bench_host.run(args)
    check(args)
    ready(args)
    return run_all(args) if args.all else run_some(args)


def build(args: argparse.Namespace, **changes: Any) -> Any:
    """The `Options` that the arguments ask for; `changes` replace them."""
    from dkv.bench.options import of_checkpoint, of_shape

    asked = {name: getattr(args, name) for name in SETTINGS} | {"policies": args.policies, "eager": not args.no_eager}
    asked = {name: value for name, value in asked.items() if value is not None} | changes
    model = asked.pop("model", args.model)
    if "policies" in asked:
        names = tuple(name for name in dict.fromkeys(asked.pop("policies")) if name != "plain")
        if args.serve:
            asked["served"] = names
        else:
            asked["blocked" if args.blocks else "policies"] = ("plain", *names)
    where = {"device": args.device, "dtype": args.dtype}
    if model is None and args.shape is not None:
        return of_shape(args.shape, args.layers, **where, **asked)
    return of_checkpoint(model or "tiny", **where, **asked)


def run_some(args: argparse.Namespace) -> int:
    """The measurements that the arguments name, on one model."""
    from dkv.bench import plots, report

    options, kinds = build(args), [name for name in OTHERS if getattr(args, name)] or ["comparison"]
    for kind in kinds:
        check_room(kind, options)

    def save(found: dict[str, Any]) -> None:
        if args.json is not None:
            files.write_json(args.json, found, indent=1)
        if args.csv is not None:
            report.save_csv(args.csv, list(found.values())[-1]["rows"])

    done: list[str] = []
    kept = [str(path) for path in (args.json, args.csv) if path is not None and not files.is_stream(path)]
    with files.beside(args.json, args.csv), _keeping(done):
        for found in documents(args, options, kinds, args.batch):
            if kept:
                save(found)
                done[:] = kept
        save(found)
        if args.plots is not None:
            print("", *plots.draw(found, args.plots), sep="\n")
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Everything in `ALL`; each file is written as soon as its figures are there."""
    from dkv.bench import plots

    if args.model is None and args.shape is None:
        args.shape = "d512x8"
    first = build(args)
    for kind, _, changes in ALL.values():
        # Before the first of them, not after half an hour.
        if "model" not in changes:
            check_room(kind, replace(first, **{key: changes[key] for key in ("prompt", "new") if key in changes}))
    done: list[str] = []
    with _keeping(done):
        for number, (name, (kind, batches, changes)) in enumerate(ALL.items(), 1):
            options, path = build(args, **changes), args.out / f"{name}.json"
            print(f"\n== {number} of {len(ALL)}: {name}")
            for found in documents(args, options, [kind], batches):
                files.write_json(path, found, indent=1)
                done[:] = [*(other for other in done if other != str(path)), str(path)]
            print("", path, *plots.draw(found, args.out, f"{name}_"), sep="\n", flush=True)
    return 0


def _keeping(done: list[str]) -> AbstractContextManager:
    """An interrupt says which files hold what is finished."""
    return process.keeping(lambda: f"finished measurements are kept in {' and '.join(done)}" if done else "")


def documents(
    args: argparse.Namespace, options: Any, kinds: Sequence[str], batches: Sequence[int] | None
) -> Iterator[dict[str, Any]]:
    """What is written as JSON, as it grows: machine, versions, date, command and model, and a part for every kind."""
    from dkv.bench import machine, report

    found = {"facts": machine.facts(options.model.device, args.command_line) | options.facts()}
    print(report.machine_line(found["facts"]), flush=True)
    for kind in kinds:
        for part in measured(kind, options, list(dict.fromkeys(batches or [BATCHES.get(kind, 1)]))):
            found[kind] = part
            yield found


def module_of(kind: str) -> Any:
    """What measures it: `measure(options)`, and `table(found)`, the figures as text."""
    return import_module(f"dkv.bench.speed.{'compare' if kind == 'comparison' else kind}")


def measured(kind: str, options: Any, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The result of a measurement so far, which is printed; a comparison has one for each batch, with those before."""
    module = module_of(kind)
    found: dict[str, Any] = {"rows": []}
    for batch in batches if kind == "comparison" else batches[:1]:
        part = module.measure(replace(options, batch=batch))
        found = {**part, "rows": found["rows"] + part["rows"]}
        print(f"\n{module.one_batch(part['rows']) if kind == 'comparison' else module.table(part)}", flush=True)
        yield found
    if kind == "comparison" and found["refused"]:
        print(module.refusals(found["refused"]))


def tables(found: dict[str, Any]) -> list[str]:
    """Those of all that was measured."""
    return [line for kind in USES if kind in found for line in ("", module_of(kind).table(found[kind]))]
