"""`dkv eval`: what a cache policy loses in exact answers, and what it wins in speed."""

import argparse
from pathlib import Path
from typing import Any

from dkv.cli.examining import add_problems, check_contenders, check_problems, loaded, with_other_weights
from dkv.cli.measuring import add_json, add_machine, check_counts, ready, show
from dkv.common import files, process

SUMMARY = "Measure exact answers against speed, for any set of policies, schedules and sampling rules."

EXAMPLES = """\
examples:
  dkv eval                                                  the bundled model on its tasks, in some minutes
  dkv eval --full --problems 500 --out results              the whole grid; repeat the command to go on
  dkv eval --run 'cache=decode refresh=2,4,8,16' --run 'steps=half,quarter'
  dkv eval --run weights=int8,bfloat16                      what weights of fewer bits lose on a CPU
  dkv eval --run 'cache=greedy refresh=4 window=0,2,4,8 window_center=last' --tasks cells
  dkv eval --model GSAI-ML/LLaDA-8B-Instruct --data problems.jsonl --new-tokens 256 --chat --out results
  dkv eval --drift --out results                            how much keys and values change between steps

A run names settings of dkv.DiffusionConfig and arguments of the policy, and weights where they are to differ from those
of the model; lists are multiplied out. Plain decoding is always among them, and losses are counted against it on the
same problems. A line of FILE is
{"prompt": ..., "answer": ...}, with a "task" where there are several; answers are compared as whole texts. Without an
"answer" what a run writes is judged by how likely the model itself finds it.
Measure on an idle machine: all runs take turns on every batch.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("problems").add_argument
    add_problems(add)

    add = parser.add_argument_group("what").add_argument
    add("--run", action="append", metavar="TEXT", dest="runs", help="settings to compare (default: nine of them)")
    add("--full", action="store_true", help="every policy, refresh interval, window and rule of the paper")
    what = "instead: change of keys and values around a slot's decoding, of --batch problems per task"
    add("--drift", action="store_true", help=what)
    add("--show", type=Path, metavar="FILE", help="instead: print the table of a JSON file again, and measure nothing")

    add = add_machine(parser)
    add("--batch", type=int, default=16, metavar="N", help="problems at a time (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    what = "keep every run here, go on with it when repeated, and draw figures (needs matplotlib)"
    add("--out", type=Path, metavar="DIR", help=what)
    add_json(add)


def run(args: argparse.Namespace) -> int:
    if args.show is not None:
        return show(args.show, tables)
    check(args)
    ready(args)
    return drift(args) if args.drift else compare(args)


def check(args: argparse.Namespace) -> None:
    """Find what is wrong with the arguments before a model is loaded.

    Raises:
        ValueError: a number too small, options that exclude each other, an output that cannot be written.
        FileNotFoundError: --data does not exist.
    """
    check_counts(args, ("problems", "batch", "threads", "new_tokens"))
    check_problems(args)
    if args.full and args.runs:
        raise ValueError("give --full or --run, not both")
    if args.drift and (args.full or args.runs):
        raise ValueError("--drift measures plain decoding: leave out --run and --full")
    _check_outputs(args)


def _check_outputs(args: argparse.Namespace) -> None:
    from dkv.bench.plots import check_installed

    outputs = [("--json", args.json)]
    if args.out is not None:
        check_installed("--out")
        name = "drift" if args.drift else "eval"
        outputs += [("--out", args.out / f"{name}.{kind}") for kind in ("json", "png")]
    files.check_outputs(outputs, [("--data", args.data)])
    if args.out is not None and not args.drift:
        from dkv.bench.accuracy.quality import LOG

        files.check_writable("--out", args.out / LOG, regular=True)


def compare(args: argparse.Namespace) -> int:
    """Exact answers and speed of the runs."""
    from dkv.bench import lineup, plots, report
    from dkv.bench.accuracy import frontier, quality
    from dkv.bench.contenders import contenders

    runs = args.runs or (lineup.FULL if args.full else lineup.QUICK)
    chosen = contenders(runs)
    model, tokenizer, problems, facts = loaded(args)
    if args.runs is None and model.spec.block_length is not None:
        if args.full:
            raise ValueError(
                "--full has policies that do not go with a block-causal model: leave it out, or give --run"
            )
        chosen = contenders(lineup.in_blocks(lineup.QUICK_IN_BLOCKS, model.spec.block_length))
    elif model.spec.shifted and args.runs is None:
        chosen = contenders((*runs, *lineup.SHIFTED))
    check_contenders(model, chosen)
    others = with_other_weights(args, chosen)
    setting = quality.Setting(model, tokenizer, problems, args.batch, args.seed, args.chat, others)
    with quality.Log(args.out, quality.fixed(setting, facts)) as log, files.beside(args.json):
        print(report.machine_line(facts), flush=True)
        with process.keeping(log.kept):
            rows = quality.measure(setting, chosen, log)
        print("", frontier.table(rows), "", frontier.verdict(rows), sep="\n")
        return save(args, {"facts": facts, "rows": rows}, "eval", plots.answers)


def drift(args: argparse.Namespace) -> int:
    """Change of keys and values between steps."""
    from dkv.bench import plots, report
    from dkv.bench.accuracy import drift as measurement

    model, tokenizer, problems, facts = loaded(args)
    with files.beside(args.json):
        print(report.machine_line(facts), flush=True)
        found = {"facts": facts, **measurement.measure(model, tokenizer, problems, args.batch, args.chat)}
        print("", measurement.table(found), "", measurement.meaning(found), sep="\n")
        return save(args, found, "drift", plots.drift)


def save(args: argparse.Namespace, found: dict[str, Any], name: str, draw: Any) -> int:
    """Write what --out and --json ask for."""
    from dkv.bench import plots

    if args.json is not None:
        files.write_json(args.json, found, indent=1)
    if args.out is not None:
        files.write_json(args.out / f"{name}.json", found, indent=1)
        plots.save(draw(found), args.out / f"{name}.png")
        print("", args.out / f"{name}.json", args.out / f"{name}.png", sep="\n")
    return 0


def tables(found: dict[str, Any]) -> list[str]:
    """That of what was measured, and what it means."""
    from dkv.bench.accuracy import drift, frontier

    if "rows" in found:
        return ["", frontier.table(found["rows"]), "", frontier.verdict(found["rows"])]
    return ["", drift.table(found), "", drift.meaning(found)]
