"""What `dkv demo` shows: one answer as it fills, and all cache policies on the same problems."""

import sys
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

import dkv
from dkv.common.bar import Bar, counted
from dkv.tools.streaming import DraftStreamer, draft_pieces, drawable, draws_drafts
from dkv.tools.text import answer

# Label, and settings of `dkv.generate`; the first is what the others are compared with. A float of steps
# is a share of the slots to fill.
LINEUP: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("DecodeCache(refresh=8)", {"cache": {"name": "decode", "refresh": 8}}),
    ("DecodeCache(refresh=4)", {"cache": {"name": "decode", "refresh": 4}}),
    ("PrefillCache()", {"cache": "prefill"}),
    ("PrefillDecodeCache(refresh=8)", {"cache": {"name": "pd", "refresh": 8}}),
    ("GreedyCache(refresh=4, window=4)", {"cache": {"name": "greedy", "refresh": 4, "window": 4}}),
    ("GreedyCache(refresh=2, window=4)", {"cache": {"name": "greedy", "refresh": 2, "window": 4}}),
    ("plain, half the steps", {"steps": 0.5}),
]
# Timed rounds of one answer per policy, after one that only warms up, and answers of a batch.
ROUNDS, BATCH = 3, 8
SNAPSHOTS = 9


@dataclass
class Race:
    """The policies of `LINEUP` on the same problems.

    Attributes:
        ids, mask: int64 [B, P], the prompts.
        answers: the right ones.
        new: slots to fill.
    """

    model: Any
    tokenizer: Any
    ids: Tensor
    mask: Tensor
    answers: list[str]
    new: int

    def decode(self, rows: list[int], streamer: Any = None, **settings: Any) -> Any:
        """The output of `dkv.generate` for some of the problems."""
        chosen = {"max_new_tokens": self.new, **settings}
        if isinstance(chosen.get("steps"), float):
            chosen["steps"] = round(chosen["steps"] * chosen["max_new_tokens"])
        return dkv.generate(self.model, self.ids[rows], self.mask[rows], streamer=streamer, seed=0, **chosen)

    def texts(self, sequences: Tensor) -> list[str]:
        """The answers in sequences [B, P + new]."""
        return [answer(self.tokenizer, self.model.spec, row) for row in sequences[:, self.ids.shape[1] :].tolist()]

    def measure(self) -> list[dict[str, Any]]:
        """A row of the table per policy."""
        total = len(LINEUP) * (1 + ROUNDS + len(self.answers))
        with Bar(total, "answer") as bar:
            speeds = self._speeds(bar)
            runs = [self._run(settings, bar) for _, settings in LINEUP]
        plain, plain_slots = runs[0]
        return [
            {
                "policy": label,
                "tokens_per_second": speeds[label],
                "speed": speeds[label] / speeds[LINEUP[0][0]],
                "computed_share": slots / plain_slots,
                "exact": sum(found == right for found, right in zip(self.texts(run), self.answers, strict=True)),
                "same_tokens": (run == plain)[:, self.ids.shape[1] :].double().mean().item(),
            }
            for (label, _), (run, slots) in zip(LINEUP, runs, strict=True)
        ]

    def _speeds(self, bar: Bar) -> dict[str, float]:
        """Tokens per second at batch 1. The policies take turns, so that a busy moment hits all of them."""
        speeds: dict[str, list[float]] = {label: [] for label, _ in LINEUP}
        for turn in range(1 + ROUNDS):
            for label, settings in LINEUP:
                output = self.decode([turn % len(self.answers)], **settings)
                speeds[label].append(output.stats.tokens_per_second)
                bar.update()
        return {label: median(found[1:]) for label, found in speeds.items()}

    def _run(self, settings: dict[str, Any], bar: Bar) -> tuple[Tensor, int]:
        """The sequences of all problems, and the number of slots computed for them."""
        rows, found, slots = list(range(len(self.answers))), [], 0
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            output = self.decode(batch, **settings)
            found.append(output.sequences)
            slots += output.stats.computed_slots
            bar.update(len(batch))
        return torch.cat(found), slots


def show(race: Race, prompt: str, right: str) -> None:
    """Decode the first problem before the eyes of the user: in place in a terminal, else as snapshots."""
    label, settings = LINEUP[1]
    print(f"{prompt}\n\n{label}, {counted(race.new, 'step')}:\n")
    if draws_drafts():
        output = race.decode([0], DraftStreamer(race.tokenizer, race.model.spec), **settings)
    else:
        output = race.decode([0], output_history=True, **settings)
        for step in sorted({round(i * (len(output.history) - 1) / (SNAPSHOTS - 1)) for i in range(SNAPSHOTS)}):
            ids = output.history[step, 0, race.ids.shape[1] :].tolist()
            pieces = draft_pieces(race.tokenizer, race.model.spec, ids, [False] * len(ids))
            print(drawable(f"step {step + 1:2}  {''.join(text for _, text in pieces)}", sys.stdout))
    (found,) = race.texts(output.sequences)
    print(f"\n{'right' if found == right else f'wrong: the answer is {right}'}\n")


def table(results: list[dict[str, Any]], problems: int) -> str:
    """The results as text."""
    lines = [f"{'policy':28}{'tokens/s':>9}{'speed':>8}{'computed':>10}{'exact':>9}{'same tokens':>13}"]
    for r in results:
        exact = f"{r['exact']}/{problems}"
        lines.append(
            f"{r['policy']:28}{r['tokens_per_second']:9.1f}{r['speed']:7.2f}x{r['computed_share']:10.0%}"
            f"{exact:>9}{r['same_tokens']:13.1%}"
        )
    return "\n".join(lines)


def meaning(parameters: int, threads: int) -> str:
    """What the table says, and what it does not."""
    return f"""
tokens/s is the median of {ROUNDS} answers, one at a time (CPU threads: {threads}); speed compares it with plain.
computed: slots sent through the network, against plain. exact: answers right in every character.

A cached step computes few slots, but every operation has a fixed cost, too. With {parameters / 1e6:.1f} M parameters
this cost weighs so much that the speed stays behind what the computed share would allow, and can be below 1. In one
of 8 B parameters the work itself dominates; for such a model the computed share tells more."""
