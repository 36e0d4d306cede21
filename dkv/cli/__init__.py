"""The command line: one module a command."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from dkv.cli import audit, bench, demo, eval, generate, infill, info, run, serve, suggest, trace, verify
from dkv.cli.several import check_command
from dkv.common import process
from dkv.version import __version__

EXAMPLES = """\
examples:
  dkv demo                                    the bundled model, with and without a cache
  dkv generate --file prompt.txt --stats      continue a text
  dkv bench --shape d512x8                    which policy pays on this machine
  dkv generate --help                         all options of a command, with examples

exit codes:
  0    done
  1    dkv verify or dkv audit found a fault; dkv run has lines without an answer
  2    bad input, or output that cannot be written; a line on standard error says which
  130  interrupted (Ctrl-C); a line on standard error says so, and what is kept
  141  nobody reads the output any more, as in dkv info | head -1
"""


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse passes over help that cannot be written.
        if message:
            (file or sys.stderr).write(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. It imports neither torch nor transformers, so help is quick."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = "Fast decoding of diffusion language models with dKV-Cache."
    parser = Parser(prog="dkv", description=about, epilog=EXAMPLES, **form)
    parser.add_argument("--version", action="version", version=f"dkv {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in (generate, infill, run, serve, trace, demo, bench, eval, suggest, verify, info, audit):
        name = command.__name__.rpartition(".")[2]
        about = command.SUMMARY
        options = commands.add_parser(name, help=about, description=about, epilog=command.EXAMPLES, **form)
        command.add_arguments(options)
        options.set_defaults(run=command.run, parser=options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit code: 0; 1 where `dkv verify` or `dkv audit` found a fault, or lines of `dkv run` have failed; 2 for
        bad input, or output that cannot be written, with one line on standard error; 130 when interrupted, with one
        line; 141 when nobody reads the output any more.
    """
    words = [*map(str, sys.argv[1:] if argv is None else argv)]
    process.called("dkv")
    return process.ended(lambda: _run(words))


def _run(words: list[str]) -> int:
    if any("\0" in word for word in words):
        raise ValueError("an argument holds a NUL character: leave it out, or give a prompt with one by --file")
    args, unknown = build_parser().parse_known_args(words)
    if unknown:
        args.parser.error(f"unknown arguments: {' '.join(unknown)}")
    process.called(f"dkv {args.command}")
    check_command(args.command)
    # A figure is worth nothing without the command behind it.
    args.command_line = shlex.join(["dkv", *words])
    return args.run(args)
