"""Check and time dkv on a GPU, in one command that needs nothing but torch, triton, transformers and numpy.

parts:
  checks   every operation on the Triton backend against float64, and what only a GPU shows
  ops      every operation against eager PyTorch, SDPA and flex attention, as shares of what the card reaches
  steps    whole generations of LLaDA-8B- and Dream-7B-shaped models of random bfloat16 weights

The exit code is 0 if all is well, 1 if a check or a kernel failed, 2 if there is no GPU, an argument is wrong or
the output cannot be written, 130 when interrupted, 141 when nobody reads the output any more.
"""

from dkv.common import process

if __name__ == "__main__":
    # Before torch is imported, which takes seconds.
    process.begin("python -m dkv.bench.gpu")

import argparse
import shlex
import sys
from dataclasses import replace

import torch

from dkv.common import files

PARTS = ("checks", "ops", "steps")

EXAMPLES = """\
examples:
  python -m dkv.bench.gpu --json result.json             everything
  python -m dkv.bench.gpu checks --only attention        some checks
  python -m dkv.bench.gpu ops steps --model dream --minutes 4
  python -m dkv.bench.gpu --device cpu                   a rehearsal of the script without a GPU
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    said = {"description": __doc__, "epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m dkv.bench.gpu", **said)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    add("--minutes", type=float, default=9, help="bound of each part, looked at between items (default: %(default)s)")
    add("--json", metavar="FILE", help="also write everything to FILE, after every item; - for standard output")
    add("--model", choices=("llada", "dream"), help="one of the two shapes (default: both)")
    add("--layers", type=int, help="layers of the models in part steps (default: as many as they have)")
    add("--only", metavar="TEXT", default="", help="only items whose name contains TEXT")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse with tiny shapes (default: cuda)")
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
    from dkv.bench.gpu import checks, ops, steps
    from dkv.bench.gpu.report import DeviceLost, Report
    from dkv.bench.machine import facts
    from dkv.bench.shapes import shape, tiny

    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    try:
        backends = backends_on(device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    known = facts(device, shlex.join(["python", "-m", "dkv.bench.gpu", *words]))
    settings = {"rehearsal": rehearsal, "backends": backends, "minutes": args.minutes}
    report = Report(args.json, {**known, **settings}, args.minutes, args.only)
    if rehearsal:
        print("REHEARSAL on the CPU with tiny shapes: the times mean nothing.")
    print(", ".join(f"{name} {value}" for name, value in known.items() if value))
    specs = {name: shape(whole) for name, whole in ops.SHAPE_OF.items() if args.model in (None, name)}
    specs = {name: tiny(spec) if rehearsal else spec for name, spec in specs.items()}
    shrunk = {name: replace(spec, num_layers=args.layers or spec.num_layers) for name, spec in specs.items()}
    parts = {
        "checks": lambda: checks.run(report, device, backends[0]),
        "ops": lambda: ops.run(report, device, backends, specs, rehearsal),
        "steps": lambda: steps.run(report, device, backends, shrunk, rehearsal),
    }
    try:
        with process.keeping(report.kept):
            for part in (part for part in parts if part in (args.parts or PARTS)):
                parts[part]()
    except DeviceLost as lost:
        report.row(f"STOPPED: {lost}", {"stopped": str(lost)}, failed=True)
        report.close(finished=False)
        return 1
    report.close(finished=True)
    if rehearsal:
        print("\nThis was a REHEARSAL on the CPU: the times mean nothing.")
    return 1 if report.failed else 0


if __name__ == "__main__":
    process.run(main)
