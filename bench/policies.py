"""Speed of the cache policies against plain decoding, on a random model of a given shape.

Every round runs each policy once, in turn, so that a machine that slows down slows all of them; the
speed of a policy is the median of its ratios to the plain run of the same round. Time on an idle
machine only.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

import dkv
from dkv.bench.shapes import SHAPES, as_loaded, random_model, shape
from dkv.models.packing import can_pack
from dkv.version import versions

# Greedy goes with the random order, as published; all others with the most probable slot first.
LINEUP: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, all rows": {"savings": dkv.Savings(needed_rows=False)},
    "decode 8": {"cache": dkv.Decode(8)},
    "decode 32": {"cache": dkv.Decode(32)},
    "prefill": {"cache": dkv.Prefill()},
    "pd 8": {"cache": dkv.PrefillDecode(8)},
    "greedy 4, window 4": {"cache": dkv.Greedy(4, 4), "confidence": "random"},
}


def measure(run: Callable[[dict], dkv.DiffusionOutput], names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row per policy: median tokens/s, speed against plain with its range, and computed share."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    share: dict[str, float] = {}
    with tqdm(total=len(names) * rounds, unit="run", leave=False, disable=None, file=sys.stderr) as bar:
        for _ in range(rounds):
            for name in names:
                stats = run(LINEUP[name]).stats
                seconds[name].append(stats.seconds)
                share[name], tokens = stats.computed_share, stats.new_tokens
                bar.update()
    rows = []
    for name in names:
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)]
        rows.append({
            "policy": name, "tokens_per_second": tokens / statistics.median(seconds[name]),
            "speed": statistics.median(ratios), "slowest": min(ratios), "fastest": max(ratios),
            "computed_share": share[name],
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dkv.bench.policies", description=__doc__,
        epilog="example:\n  python -m dkv.bench.policies --prompt 896 --new 128 --policies plain 'decode 32' prefill",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="d512x8", help="hidden size x layers (default: %(default)s)")
    add("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    add("--new", type=int, default=128, help="tokens to decode, one per step (default: %(default)s)")
    add("--batch", type=int, default=1, help="rows (default: %(default)s)")
    add("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch (default: %(default)s)")
    add("--policies", nargs="+", choices=LINEUP, default=list(LINEUP), metavar="NAME", help=", ".join(LINEUP))
    add("--no-pack", action="store_true", help="leave the weights as nn.Linear holds them")
    add("--json", metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pack = can_pack() and not args.no_pack
    model = random_model(shape(args.shape), torch.device("cpu"), torch.float32)
    model = as_loaded(model) if pack else model
    vocabulary = model.spec.vocab_size
    ids = torch.randint(vocabulary - 1, (args.batch, args.prompt), generator=torch.Generator().manual_seed(1))

    def run(settings: dict[str, Any], new: int = args.new) -> dkv.DiffusionOutput:
        return dkv.generate(model, ids, max_new_tokens=new, seed=0, **settings)

    names = ["plain", *(name for name in args.policies if name != "plain")]
    for name in names:
        run(LINEUP[name], new=min(4, args.new))
    rows = measure(run, names, args.rounds)
    facts = {
        "shape": args.shape, "prompt": args.prompt, "new": args.new, "batch": args.batch, "threads": args.threads,
        "packed": pack, "rounds": args.rounds, "machine": platform.machine(), **versions(),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'policy':20} {'tokens/s':>9} {'speed':>7} {'range':>14} {'computed':>9}")
    for row in rows:
        span = f"{row['slowest']:.2f} - {row['fastest']:.2f}"
        print(
            f"{row['policy']:20} {row['tokens_per_second']:9.2f} {row['speed']:6.2f}x {span:>14} "
            f"{row['computed_share']:9.0%}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"facts": facts, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
