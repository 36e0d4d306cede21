"""`dkv suggest`: the fastest settings that lose little on problems of your own."""

import argparse
from functools import partial
from pathlib import Path

from dkv.cli.examining import add_problems, check_contenders, check_problems, loaded, with_other_weights
from dkv.cli.measuring import add_json, add_machine, check_counts, ready
from dkv.common import files, process

SUMMARY = "Try policies and rules on a model's problems, and name the fastest that loses little."

EXAMPLES = """\
examples:
  dkv suggest                                                    the bundled model on its tasks
  dkv suggest --lose 0.5 --problems 256                          a stricter answer, and a surer one
  dkv suggest --model GSAI-ML/LLaDA-8B-Instruct --data problems.jsonl --new-tokens 256 --chat --out results
  dkv suggest --model tiny --run 'cache=decode refresh=4,8,16 threshold=0.9,0.95'

A line of FILE is {"prompt": ..., "answer": ...}; without an "answer" a text counts as lost where the model itself finds
it less likely than what plain decoding writes. All runs take turns on every batch. One that is sure to lose more than
is allowed is left out of the batches that follow. A run is written as for dkv eval. Measure on an idle machine.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_problems(parser.add_argument_group("problems").add_argument)
    add = parser.add_argument_group("what").add_argument
    what = "points of exact answers that may be lost against plain decoding (default: %(default)g)"
    add("--lose", type=float, default=1.0, metavar="X", help=what)
    add("--run", action="append", metavar="TEXT", dest="runs", help="settings to try (default: a line-up)")
    add = add_machine(parser)
    add("--batch", type=int, default=16, metavar="N", help="problems at a time (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="keep every batch here, and go on with it when repeated")
    add_json(add)


def run(args: argparse.Namespace) -> int:
    check(args)
    ready(args)
    from dkv.bench import lineup, report
    from dkv.bench.accuracy import frontier, quality, suggest
    from dkv.bench.contenders import contenders

    chosen = contenders(args.runs or lineup.SUGGESTED)
    model, tokenizer, problems, facts = loaded(args)
    if args.runs is None and model.spec.block_length is not None:
        chosen = contenders(lineup.in_blocks(lineup.SUGGESTED_IN_BLOCKS, model.spec.block_length))
    check_contenders(model, chosen)
    others = with_other_weights(args, chosen)
    setting = quality.Setting(model, tokenizer, problems, args.batch, args.seed, args.chat, others)
    with quality.Log(args.out, quality.fixed(setting, facts)) as log, files.beside(args.json):
        print(report.machine_line(facts), flush=True)
        with process.keeping(log.kept):
            rows = quality.measure(setting, chosen, log, partial(suggest.lost, points=args.lose))
        print("", frontier.table(rows), "", suggest.verdict(rows, args.lose), sep="\n")
        best = suggest.best(rows, args.lose)
        if best is not None:
            print(suggest.in_python(next(c for c in chosen if c.label == best["label"])))
        if args.json is not None:
            files.write_json(args.json, {"facts": facts, "rows": rows, "best": best and best["label"]}, indent=1)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for what is wrong with the arguments, before a model is loaded."""
    check_counts(args, ("problems", "batch", "threads", "new_tokens"))
    check_problems(args)
    if not 0 <= args.lose <= 100:
        raise ValueError(f"--lose must be between 0 and 100 points, got {args.lose:g}")
    files.check_outputs([("--json", args.json)], [("--data", args.data)])
    if args.out is not None:
        from dkv.bench.accuracy.quality import LOG

        files.check_writable("--out", args.out / LOG, regular=True)
