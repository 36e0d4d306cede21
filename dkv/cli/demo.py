"""`dkv demo`: the bundled model at work."""

import argparse
import json

from dkv.cli.measuring import TASK_NAMES, check_counts

SUMMARY = "Watch the bundled model answer, and compare the cache policies on it: speed, work and answers."

EXAMPLES = """\
examples:
  dkv demo
  dkv demo --task cells --model tiny-dream
  dkv demo --problems 100 --threads 1
  dkv demo --json > demo.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--problems", type=int, default=24, metavar="N", help="problems to answer per policy (default: %(default)s)")
    add(
        "--task",
        choices=TASK_NAMES,
        default=TASK_NAMES[0],
        metavar="NAME",
        help=f"{', '.join(TASK_NAMES)} (default: %(default)s)",
    )
    add("--model", default="tiny",
        help="tiny, tiny-dream, or a folder with a model of the same task (default: %(default)s)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--json", action="store_true", help="the table as one JSON object, without the drafts")


def run(args: argparse.Namespace) -> int:
    check_counts(args, ("problems", "threads"))
    import torch

    import dkv
    from dkv.models.bundled.tasks import TASKS, held_out
    from dkv.tools.demo import ROUNDS, Race, meaning, show, table
    from dkv.tools.text import encode

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = dkv.load(args.model, device="cpu")
    tokenizer = dkv.load_tokenizer(args.model)
    problems = held_out(args.problems, task=args.task)
    prompts, answers = map(list, zip(*problems, strict=True))
    race = Race(model, tokenizer, *encode(tokenizer, prompts), answers, TASKS[args.task].new_tokens)
    if not args.json:
        show(race, *problems[0])
    results = race.measure()
    if args.json:
        facts = {
            "model": args.model,
            "task": args.task,
            "problems": args.problems,
            "threads": torch.get_num_threads(),
            "rounds": ROUNDS,
        }
        print(json.dumps({**facts, "results": results}))
    else:
        print(table(results, args.problems))
        print(meaning(model.num_parameters, torch.get_num_threads()))
    return 0
