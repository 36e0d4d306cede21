"""`dkv bench --host`: what the host starts in a step on a GPU, counted without one."""

import argparse
from dataclasses import asdict

from dkv.cli.measuring import check_counts
from dkv.common import files
from dkv.common.bar import Bar

# Options of `dkv bench` that have no effect here.
OTHERS = (
    *("model", "policies", "no_eager", "prompt", "new", "steps", "batch", "rounds", "threads", "device", "dtype"),
    *("csv", "plots", "all", "out", "floor", "mass", "growth", "memory", "blocks", "serve"),
)

TIMES = """\
host ms: what an eager step takes this CPU, measured with layers that are narrow and a driver that launches nothing.
PyTorch's part is that of calls on a CPU, and a launch in CUDA's driver (some 2 to 4 us each) is not in it."""
WITHOUT_TIMES = "host ms is not measured with TRITON_INTERPRET=1, where the kernels themselves run"


def run(args: argparse.Namespace) -> int:
    """Print the counts, and write them with --json.

    Raises:
        ValueError: an option that has no effect here, or Triton is missing.
    """
    for name, value in vars(args).items():
        if value and name in OTHERS:
            raise ValueError(f"--{name.replace('_', '-')} has no effect on --host: leave it out")
    check_counts(args, ["layers"])
    from dkv.kernels.common.backend import interpreted, named

    named("triton", "--host")
    from dkv.bench import host
    from dkv.bench.shapes import shape
    from dkv.version import versions

    files.check_outputs([("--json", args.json)])
    title = args.shape or "llada-8b"
    spec = shape(title, args.layers)
    found = {"facts": {"shape": title, **asdict(spec), **versions()}, "host": {"rows": []}}
    with files.beside(args.json), Bar(len(host.CASES), "setting") as bar:
        size = f"{spec.num_layers} layers, bfloat16, 448 + 64 slots"
        print(f"{title}, {size}: launches of a step as on an H100\n", flush=True)
        for name in host.CASES:
            found["host"]["rows"].extend(host.measure(spec, [name], timed=not interpreted()))
            bar.update()
        print(host.table(found["host"]))
        print("\n" + (WITHOUT_TIMES if interpreted() else TIMES))
        if args.json is not None:
            files.write_json(args.json, found, indent=1)
    return 0
