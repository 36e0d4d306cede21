"""The command line: `dkv generate`, `infill`, `trace`, `demo`, `bench`, `eval`, `verify`, `info` and `audit`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from dkv.commands import audit, bench, demo, eval, generate, infill, info, trace, verify
from dkv.version import __version__

EXAMPLES = """\
examples:
  dkv demo                                    the bundled model, with and without a cache
  dkv generate --file prompt.txt --stats      continue a text
  dkv bench --shape d512x8                    which policy pays on this machine
  dkv generate --help                         all options of a command, with examples
"""

# What bad input raises. Anything else is a fault of ours and keeps its traceback.
USER_ERRORS = (ValueError, IndexError, TypeError, OSError, MemoryError)


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. It imports neither torch nor transformers, so help is quick."""
    parser = Parser(
        prog="dkv", description="Fast decoding of diffusion language models with dKV-Cache.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dkv {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in (generate, infill, trace, demo, bench, eval, verify, info, audit):
        name = command.__name__.rpartition(".")[2]
        options = commands.add_parser(
            name, help=command.SUMMARY, description=command.SUMMARY, epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        command.add_arguments(options)
        options.set_defaults(run=command.run, parser=options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit code: 0; 1 where `dkv verify` or `dkv audit` found a fault; 2 for bad input, with one line on
        standard error; 130 when interrupted; 141 when nobody reads the output any more.
    """
    try:
        args, unknown = build_parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unknown arguments: {' '.join(unknown)}")
        # A figure is worth nothing without the command behind it.
        args.command_line = shlex.join(["dkv", *map(str, sys.argv[1:] if argv is None else argv)])
    except SystemExit as stop:
        return stop.code
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes once more when it exits: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # torch's OutOfMemoryError, told by name as torch is not imported here.
        if not isinstance(error, USER_ERRORS) and type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"dkv {args.command}: error: {_line(error)}", file=sys.stderr)
        return 2


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
