"""`dkv run`: answer a whole data set."""

import argparse
from pathlib import Path

from dkv.cli import generate
from dkv.cli.families import add_blocks
from dkv.cli.model import add_told, add_weights, told, weights
from dkv.cli.several import follow, let_go, ranks_of
from dkv.common import files, process

SUMMARY = "Answer a whole data set, line by line into a file, on one device or several."

EXAMPLES = """\
examples:
  dkv run tiny --data prompts.jsonl --out answers --cache decode --refresh 8
  dkv run GSAI-ML/LLaDA-8B-Instruct --data chats.jsonl --out answers --cache dual --block-length 32 --threshold 0.9
  dkv run GSAI-ML/LLaDA-8B-Instruct --data chats.jsonl --out answers --devices cuda:0,cuda:1

A line of FILE is {"id": "a", "prompt": "1+2="}, or {"id": 7, "messages": [{"role": "user", "content": "..."}]}, and may
have "max_new_tokens", "steps" and "seed" of its own. Ids are texts or whole numbers, each once; where no line has one,
its number stands in. Answers go to results.jsonl in DIR as they come, a line each. Repeat the command to go on,
whatever ended it: nothing is lost, and nothing done twice. A line that cannot be answered has a record with an "error"
there. The seed is that of the run: each line's own follows from it and the id, and stands in its record.

Exit code: 0 where all lines have an answer, 1 where some have failed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("model", metavar="MODEL", help="a bundled model, a checkpoint folder or a hub id")
    add("--data", type=Path, required=True, metavar="FILE", help="prompts or talks, as JSON lines")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for results.jsonl and what it was made with")
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template; messages always are")
    add = parser.add_argument_group("model").add_argument
    add_weights(add)
    several = "such as cuda:0,cuda:1 or cpu,cpu, a process each; or the number of GPUs (default: one device)"
    add("--devices", metavar="LIST", help=several)
    add_told(add)
    add = parser.add_argument_group("limits").add_argument
    rows = "slots of all rows of a device (default: what part of its free memory holds)"
    add("--max-slots", type=int, metavar="N", help=rows)
    length = "slots of a line and its answer; longer ones fail (default: what the model has)"
    # `max_length` is a setting of a generation, too.
    add("--max-length", type=int, dest="row_length", metavar="N", help=length)
    generate.add_decoding(parser, new_tokens=128)
    add_blocks(parser)


def run(args: argparse.Namespace) -> int:
    if not args.data.is_file():
        raise FileNotFoundError(f"--data: there is no file {args.data}")
    import dkv
    from dkv.serving.dataset import RESULTS, Run
    from dkv.serving.devices import devices_of
    from dkv.serving.job import Job
    from dkv.serving.lines import from_file

    devices = devices_of(args.devices)
    if process.several() and devices and len(devices) > 1:
        raise ValueError("--devices has a model on each, and torchrun shares one: leave one of them out")
    ranks = ranks_of(devices and devices[0])
    if follow(ranks, lambda: dkv.load(args.model, ranks=ranks, **weights(args), **told(args))):
        return 0
    results = args.out / RESULTS
    files.check_outputs([("--out", results)], [("--data", args.data)])
    files.check_writable("--out", results, regular=True)
    config = dkv.DiffusionConfig(**generate.settings(args))
    job = Job(
        model=args.model,
        tokenizer=dkv.load_tokenizer(args.model),
        config=config,
        loading={**weights(args), **told(args)},
        chat=args.chat,
        devices=devices,
        max_slots=args.max_slots,
        max_length=args.row_length,
    )
    with Run(from_file(args.data), job, args.out, option="--out") as work:
        if work.done:
            process.say(f"dkv run: {work.done} of {len(work.lines)} lines are done already")
        counts = work.go()
    let_go(ranks)
    print(f"{work.journal.path}: {counts.summary()}")
    return 1 if counts.failed else 0
