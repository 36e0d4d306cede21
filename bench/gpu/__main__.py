"""Check and time dkv on a GPU, in one command that needs nothing but torch, triton, transformers and numpy.

parts, in the order in which they decide, each in a process of its own:
  profile   what a step costs: the host, the device, its products alone, its kernels, the weights at copy bandwidth
  steps     whole generations, one row, against plain decoding, eager PyTorch and the published method
  checks    generations, graphs and every operation on the Triton backend, against float64
  autotune  the fastest entries of the launch tables on this card
  ops       every operation against eager PyTorch, SDPA and flex attention, as shares of what the card reaches
  more      whole generations of Dream-7B, and of 8 rows

Models are LLaDA-8B and Dream-7B in shape, with random bfloat16 weights. What ends a part, an error or its time, leaves
the others alone. The exit code is 0 if all is well, 1 if a check or a kernel failed or a part did not end by itself, 2
if there is no GPU, an argument is wrong or the output cannot be written, 130 when interrupted, 141 when nobody reads
the output any more.
"""

from dkv.common import process

if __name__ == "__main__":
    # Before torch is imported, which takes seconds.
    process.begin("python -m dkv.bench.gpu")

import argparse
import shlex
import sys
import time
from typing import Any

import torch

from dkv.bench.gpu.supervise import PARTS, end_with_the_parent, supervise
from dkv.common import files

EXAMPLES = """\
examples:
  python -m dkv.bench.gpu --json result.json             everything, what decides most first
  python -m dkv.bench.gpu profile steps                  a part of it
  python -m dkv.bench.gpu checks --only attention        some checks
  python -m dkv.bench.gpu ops --model dream --minutes 4
  python -m dkv.bench.gpu --device cpu                   a rehearsal of the script without a GPU
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    said = {"description": __doc__, "epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m dkv.bench.gpu", **said)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    add(
        "--minutes", type=float, default=9, help="of all parts together, looked at between items (default: %(default)s)"
    )
    add("--json", metavar="FILE", help="also write everything to FILE, after every item; - for standard output")
    add("--model", choices=("llada", "dream"), help="one of the two shapes (default: both)")
    add("--layers", type=int, help="layers of the models (default: as many as they have)")
    add("--only", metavar="TEXT", default="", help="only items whose name contains TEXT")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse with tiny shapes (default: cuda)")
    # Of a process that takes a share of a part's items, "i/n", until a time of the monotonic clock.
    add("--child", nargs=2, metavar=("SHARE", "UNTIL"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers must be at least 1, got {args.layers}")
    if not args.minutes > 0:
        parser.error(f"--minutes must be a positive number, got {args.minutes:g}")
    try:
        files.check_outputs([("--json", args.json)])
    except ValueError as error:
        parser.error(str(error))
    return args


def backends_on(device: torch.device) -> list[str]:
    """The backends that run on a device, the one under test first.

    Raises:
        RuntimeError: the kernels cannot run on the GPU.
    """
    from dkv.kernels.common import backend

    runs = backend.has_triton()
    if device.type == "cuda":
        if not runs:
            raise RuntimeError("the package triton is not installed: nothing to check or time")
        if backend.interpreted():
            raise RuntimeError("TRITON_INTERPRET is set, which runs the kernels on the host: unset it")
    elif runs:
        runs = backend.interpreted()
    return ["triton", "torch"] if runs else ["torch"]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    with files.beside(args.json):
        return measured(args, sys.argv[1:] if argv is None else argv)


def measured(args: argparse.Namespace, words: list[str]) -> int:
    """Go through the parts; returns the exit code."""
    rehearsal = args.device == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        none = f"no CUDA or ROCm device: torch {torch.__version__} sees none. --device cpu rehearses the script"
        print(none, file=sys.stderr)
        return 2
    # Imported here, so that the message above comes at once and on any machine.
    from dkv.bench.gpu import verdict
    from dkv.bench.gpu.report import Report
    from dkv.bench.machine import facts

    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    try:
        backends = backends_on(device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    until, share = time.monotonic() + 60 * args.minutes, (0, 1)
    if args.child:
        end_with_the_parent()
        until, share = float(args.child[1]), tuple(map(int, args.child[0].split("/")))
    known = facts(device, shlex.join(["python", "-m", "dkv.bench.gpu", *words]))
    settings = {"rehearsal": rehearsal, "backends": backends, "minutes": args.minutes}
    report = Report(args.json, {**known, **settings}, until, args.only, share)
    parts = [part for part in PARTS if part in (args.parts or PARTS)]
    with process.keeping(report.kept):
        if args.child:
            finished = one(report, parts[0], args, device, backends)
        else:
            if rehearsal:
                print("REHEARSAL on the CPU with tiny shapes: the times mean nothing.")
            print(", ".join(f"{name} {value}" for name, value in known.items() if value), flush=True)
            if len(parts) == 1 and (rehearsal or PARTS[parts[0]].processes == (1,)):
                finished = one(report, parts[0], args, device, backends)
            else:
                supervise(report, parts, options(args), not rehearsal)
                finished = True
            print(verdict.text(report.content), flush=True)
    report.close(finished)
    if rehearsal and not args.child:
        print("\nThis was a REHEARSAL on the CPU: the times mean nothing.")
    return 1 if report.failed else 0


def options(args: argparse.Namespace) -> list[str]:
    """What was asked for, for the process of a part."""
    given = {"--device": args.device, "--only": args.only, "--model": args.model, "--layers": args.layers}
    return [f"{name}={value}" for name, value in given.items() if value]


def one(report: Any, part: str, args: argparse.Namespace, device: torch.device, backends: list[str]) -> bool:
    """Go through a part here; returns whether to its end. An error that ends it is a row with its traceback."""
    from dkv.bench.gpu.lab import Lab
    from dkv.bench.gpu.parts import RUN
    from dkv.bench.gpu.report import DeviceLost, in_full

    try:
        RUN[part](report, Lab.of(device, backends, args.model, args.layers))
    except Exception as error:
        lost = isinstance(error, DeviceLost)
        line = f"STOPPED: {error}" if lost else f"STOPPED: {in_full(error)['traceback']}"
        report.row(line, {"stopped": str(error), **in_full(error)}, failed=True)
        return False
    return True


if __name__ == "__main__":
    process.run(main)
