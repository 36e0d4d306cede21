"""`dkv trace`: what the cache did in one generation, as a heat map and as a page to step through."""

import argparse
from pathlib import Path
from typing import Any

from dkv.cli.generate import add_generation, prepare, read_prompts
from dkv.common import files

SUMMARY = "Show what the cache does: a heat map of steps and slots, and a page to step through one generation."

EXAMPLES = """\
examples:
  dkv trace --max-new-tokens 64 --cache decode '+1 +2 -3 +1 -2 +3 +3 -1 -2 +1 +2 -3 -1 +2 +2 -1 +3 -2 -3 +1 +2='
  dkv trace --model GSAI-ML/LLaDA-8B-Instruct --chat --cache pd --refresh 16 --out sky 'Why is the sky blue?'
  dkv trace --confidence random --cache greedy --out greedy --json greedy/trace.json --file prompt.txt

Writes trace.png, which needs matplotlib (pip install 'dkv[bench]'), and trace.html, which opens from disk in any
browser and loads nothing from elsewhere. Write a prompt that begins with a dash after `--`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Known, though of no use here: whoever comes from dkv generate is told why.
    add_generation(parser, argparse.SUPPRESS)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("trace"), metavar="FOLDER", help="of both files (default: %(default)s)")
    everything = "everything that was recorded, as JSON too; - for standard output"
    add("--json", type=Path, metavar="FILE", help=everything)


def run(args: argparse.Namespace) -> int:
    if args.lines:
        raise ValueError("--lines makes a batch, and a trace is of one prompt: give PROMPT, or --file FILE")
    prompts = read_prompts(args)
    paths = {"png": args.out / "trace.png", "html": args.out / "trace.html"}
    from dkv.tools.trace import picture

    picture.check_installed()
    files.check_outputs([*(("--out", path) for path in paths.values()), ("--json", args.json)], [("--file", args.file)])
    found = _recorded(args, prompts)
    from dkv.common.bar import counted
    from dkv.tools.trace import write_json, write_page, write_picture

    with files.beside(*paths.values(), args.json):
        print(write_picture(found, paths["png"]), write_page(found, paths["html"]), sep="\n")
        if args.json is not None:
            print(write_json(found, args.json))
        passes = f"{counted(found.passes, 'pass')} ({found.full.sum()} full)"
        cost = f"{found.computed_share:.0%} of the slots computed, {passes}"
        print(f"{found.policy}: {cost}, {counted(found.stats.new_tokens, 'token')}, seed {found.stats.seed}")
    return 0


def _recorded(args: argparse.Namespace, prompts: list[str]) -> Any:
    from dkv.tools.streaming import ProgressStreamer
    from dkv.tools.trace import record

    config, model, tokenizer, ids, _ = prepare(args, prompts)
    streamer = ProgressStreamer(config.of_row("max_new_tokens", 0), model.spec.mask_token_id)
    try:
        return record(model, tokenizer, ids, config, streamer, name=args.model)
    finally:
        streamer.end()
