"""How often `dkv.fill_gaps` finds the true length of a gap, and with it what is missing.

    python -m dkv.bench.accuracy.gaps --model tiny --problems 24

Spans of random place and length, from none to all that the limit allows, are cut from the answers of unseen problems
of the bundled tasks. For comparison, the same candidates are judged by the mean confidence in the best tokens of the
first pass. Every length is equally often the true one, so that chance is one in limit + 1.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch

import dkv
from dkv.bench import report
from dkv.bench.accuracy.intervals import wilson
from dkv.models.bundled.tasks import TASKS, held_out
from dkv.tools.text import ids_of

LIMIT = 8


def cut(answer: str, count: int, limit: int, rng: random.Random) -> list[tuple[int, int]]:
    """`count` spans of 0 to `limit` characters, from left to right, text before and between them."""
    share = len(answer) // count
    spans = []
    for number in range(count):
        length = rng.randint(0, min(limit, share - 1))
        start = number * share + 1 + rng.randrange(share - length)
        spans.append((start, start + length))
    return spans


def measure(name: str, problems: int, count: int = 1, limit: int = LIMIT) -> list[dict[str, Any]]:
    """A row per task.

    Args:
        name: a bundled model.
        problems: of each task.
        count: gaps in every text.

    Returns:
        "task", "gaps", and how many of them: "length" (true length found), "exact" (and every character),
        "confidence" (true length found by the confidence of the first pass; None for several gaps).
    """
    model, tokenizer, rows = dkv.load(name), dkv.load_tokenizer(name), []
    for task in TASKS:
        rng = random.Random(f"gaps of {task}")
        row = {"task": task, "gaps": problems * count, "length": 0, "exact": 0, "confidence": 0 if count == 1 else None}
        for prompt, answer in held_out(problems, task=task):
            spans = cut(answer, count, limit, rng)
            starts, ends = [0, *(stop for _, stop in spans)], [*(start for start, _ in spans), len(answer)]
            pieces = [answer[a:b] for a, b in zip(starts, ends, strict=True)]
            pieces[0] = prompt + pieces[0]
            ids = [ids_of(tokenizer, piece, add_special_tokens=False) if piece else [] for piece in pieces]
            text = [part for piece in ids for part in (*piece, dkv.Gap(0, limit))][:-1]
            for filling, (start, stop) in zip(dkv.fill_gaps(model, [text], seed=0).fillings[0], spans, strict=True):
                row["length"] += len(filling) == stop - start
                row["exact"] += tokenizer.decode(filling) == answer[start:stop]
            if count == 1:
                row["confidence"] += by_confidence(model, *ids, limit) == spans[0][1] - spans[0][0]
        rows.append(row)
    return rows


@torch.no_grad()
def by_confidence(model: Any, left: Sequence[int], right: Sequence[int], limit: int) -> int:
    """The length, at least 1, at which the best tokens of the first pass are surest in the mean."""
    found = {}
    for length in range(1, limit + 1):
        logits = model(torch.tensor([[*left, *[model.spec.mask_token_id] * length, *right]], device=model.device))[0]
        first = len(left) - model.spec.shifted
        found[length] = logits[first : first + length].float().log_softmax(-1).amax(-1).mean().item()
    return max(found, key=found.get)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per task, and one for all."""
    total = {"task": "all", "gaps": sum(row["gaps"] for row in rows)}
    for key in ("length", "exact", "confidence"):
        total[key] = None if rows[0][key] is None else sum(row[key] for row in rows)

    def share(key: str) -> report.Cell:
        return lambda row: "" if row[key] is None else f"{row[key] / row['gaps']:.1%}"

    def length(row: dict[str, Any]) -> str:
        low, high = wilson(row["length"], row["gaps"])
        return f"{share('length')(row)} ({low:.0%} to {high:.0%})"

    cells = {"task": "{task}", "gaps": "{gaps}", "true length": length}
    return report.table([*rows, total], cells | {"exact": share("exact"), "by confidence": share("confidence")})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dkv.bench.accuracy.gaps", description="Hit rate of dkv.fill_gaps.")
    parser.add_argument("--model", default="tiny", choices=("tiny", "tiny-dream"))
    numbers = {"problems": (24, "of each task"), "gaps": (1, "in every text"), "limit": (LIMIT, "tokens of a gap")}
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    args = parser.parse_args()
    for name in numbers:
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.gaps > 8:
        parser.error(f"--gaps must be at most 8, which leave text between them, got {args.gaps}")
    print(table(measure(args.model, args.problems, args.gaps, args.limit)))


if __name__ == "__main__":
    main()
