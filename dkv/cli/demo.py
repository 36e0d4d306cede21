"""`dkv demo`: the bundled model at work."""

import argparse
import json

from dkv.cli.measuring import TASK_NAMES, check_counts

SUMMARY = "Watch the bundled model answer, and compare the cache policies on it: speed, work and answers."

EXAMPLES = """\
examples:
  dkv demo
  dkv demo --task cells --model tiny-dream
  dkv demo --task cells --model tiny-block          in blocks of 32 slots
  dkv demo --problems 100 --threads 1
  dkv demo --json > demo.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--problems", type=int, default=24, metavar="N", help="problems to answer per policy (default: %(default)s)")
    known = f"{', '.join(TASK_NAMES)} (default: %(default)s)"
    add("--task", choices=TASK_NAMES, default=TASK_NAMES[0], metavar="NAME", help=known)
    what = "tiny, tiny-dream, tiny-block, or a folder with a model of the same task (default: %(default)s)"
    add("--model", default="tiny", help=what)
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--json", action="store_true", help="the table as one JSON object, without the drafts")


def run(args: argparse.Namespace) -> int:
    check_counts(args, ("problems", "threads"))
    import torch

    import dkv
    from dkv.bench.accuracy.demo import ROUNDS, meaning, measure, show, table
    from dkv.bench.problems import Exam, bundled

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = dkv.load(args.model, device="cpu")
    exam = Exam(model, dkv.load_tokenizer(args.model), *bundled([args.task], args.problems))
    if not args.json:
        show(exam)
    results = measure(exam)
    if args.json:
        facts = {name: getattr(args, name) for name in ("model", "task", "problems")}
        print(json.dumps({**facts, "threads": torch.get_num_threads(), "rounds": ROUNDS, "results": results}))
    else:
        print(table(results, args.problems))
        print(meaning(model.num_parameters, torch.get_num_threads()))
    return 0
