"""What `dkv demo` shows: one answer as it fills, and cache policies on the same problems."""

import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dkv.bench import report
from dkv.bench.contenders import Contender, of_lineup
from dkv.bench.lineup import SHOWN, SHOWN_IN_BLOCKS
from dkv.bench.problems import Exam
from dkv.bench.timing import in_turn
from dkv.common.bar import Bar, counted
from dkv.engine.in_blocks import block_rule
from dkv.tools.streaming import DraftStreamer, draft_pieces, drawable, draws_drafts
from dkv.tools.text import answer

# Timed rounds of one answer per policy, after one that only warms up.
ROUNDS = 3
SNAPSHOTS = 9


def measure(exam: Exam) -> list[dict[str, Any]]:
    """A line of the table per policy: speed at batch 1, and the answers to all problems."""
    names = SHOWN if exam.model.spec.attention == "full" else SHOWN_IN_BLOCKS
    lineup, count = [of_lineup(name) for name in names], len(exam.problems.answers)
    with Bar(len(lineup) * (1 + ROUNDS + count), "answer") as bar:
        turns = iter(range(len(lineup) * (1 + ROUNDS)))
        calls = {c.label: partial(_speed, exam, c, turns, len(lineup)) for c in lineup}
        speeds = {label: median(found[1:]) for label, found in in_turn(calls, 1 + ROUNDS, bar).items()}
        runs = [_answered(exam, contender, bar) for contender in lineup]
    plain, plain_slots, _ = runs[0]
    return [
        {
            "policy": contender.label,
            "tokens_per_second": speeds[contender.label],
            "speed": speeds[contender.label] / speeds[SHOWN[0]],
            "computed_share": slots / plain_slots,
            "exact": exact,
            "same_tokens": (run == plain).double().mean().item(),
        }
        for contender, (run, slots, exact) in zip(lineup, runs, strict=True)
    ]


def _speed(exam: Exam, contender: Contender, turns: Any, policies: int) -> float:
    """New slots per second of one answer; each round has a problem of its own."""
    at = next(turns) // policies % len(exam.problems.answers)
    output, _ = exam.decode(at, at + 1, **_settings(exam, contender))
    return output.stats.tokens_per_second


def _answered(exam: Exam, contender: Contender, bar: Bar) -> tuple[Tensor, float, int]:
    """The new tokens of all problems, the slots computed for them, and how many answers are right."""
    new, slots, exact = [], 0, 0
    for output, right in exam.sit(**_settings(exam, contender)):
        new.append(output.sequences[:, -exam.problems.new :])
        slots, exact = slots + output.stats.computed_work, exact + sum(right)
        bar.update(len(right))
    return torch.cat(new), slots, exact


def _settings(exam: Exam, contender: Contender) -> dict[str, Any]:
    return {"seed": 0, **contender.settings_for(exam.problems.new)}


def show(exam: Exam) -> None:
    """Decode the first problem before the eyes of the user: in place in a terminal, else as snapshots."""
    spec, contender, right = exam.model.spec, of_lineup(SHOWN[1]), exam.problems.answers[0]
    cache = contender.settings["cache"]
    print(f"{exam.problems.prompts[0]}\n\n{type(cache).__name__}(refresh={cache.refresh}), ", end="")
    steps = exam.problems.new
    if (rule := block_rule(spec)) is not None:
        steps += rule.extra(len(exam.problems.prompts[0]), steps)
    print(f"{counted(steps, 'step')}:\n")
    if draws_drafts():
        streamer = DraftStreamer(exam.tokenizer, spec)
        output, _ = exam.decode(0, 1, streamer=streamer, **_settings(exam, contender))
    else:
        output, _ = exam.decode(0, 1, output_history=True, **_settings(exam, contender))
        for step in sorted({round(i * (len(output.history) - 1) / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)}):
            ids = output.history[step, 0, -exam.problems.new :].tolist()
            pieces = draft_pieces(exam.tokenizer, spec, ids, [False] * len(ids))
            print(drawable(f"step {step + 1:2}  {''.join(text for _, text in pieces)}", sys.stdout))
    found = answer(exam.tokenizer, spec, output.sequences[0, -exam.problems.new :].tolist())
    print(f"\n{'right' if found == right else f'wrong: the answer is {right}'}\n")


def table(results: list[dict[str, Any]], problems: int) -> str:
    """The results as text."""
    cells = {"policy": "{policy}", "tokens/s": "{tokens_per_second:.1f}", "speed": "{speed:.2f}x"}
    cells |= {"computed": "{computed_share:.0%}", "exact": f"{{exact}}/{problems}", "same tokens": "{same_tokens:.1%}"}
    return report.table(results, cells)


def meaning(parameters: int, threads: int) -> str:
    """What the table says, and what it does not."""
    return f"""
tokens/s is the median of {ROUNDS} answers, one at a time (CPU threads: {threads}); speed compares it with plain.
computed: slots sent through the network, against plain. exact: answers right in every character.

A cached step computes few slots, but every operation has a fixed cost, too. With {parameters / 1e6:.1f} M parameters
this cost weighs so much that the speed stays behind what the computed share would allow, and can be below 1. In one
of 8 B parameters the work itself dominates; for such a model the computed share tells more."""
