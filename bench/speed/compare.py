"""Cache policies end to end, against plain decoding and against the eager baseline.

Every round runs each contender once, in turn, so that a machine that slows down slows all of them;
ratios are taken within a round. Time on an idle machine only.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dkv.bench import report
from dkv.bench.baselines import dkv_cache
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.speed.allocations import peak
from dkv.bench.timing import in_turn, synchronise, timed
from dkv.common.bar import Bar
from dkv.engine.engine import Engine, StepResult
from dkv.engine.replay import replay


@dataclass(frozen=True)
class StepTime:
    """A step: whether it computed every slot, how many it did (None: not told), and its seconds."""

    full: bool
    slots: int | None
    seconds: float


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        seconds: of the whole call.
        tokens: int64 [B, new].
        steps: those with a pass.
        computed_share: slots computed, as a share of those that plain decoding computes; None: not told.
    """

    seconds: float
    tokens: Tensor
    steps: tuple[StepTime, ...]
    computed_share: float | None = None


# (policy, "dkv" or "eager")
Key = tuple[str, str]


def numbers(step: int, shape: tuple[int, int]) -> Tensor:
    """Uniform numbers of a random order: the same for dkv and the baseline."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(step))


def settings_of(policy: str, steps: int | None) -> dict[str, Any]:
    """What dkv and the baseline are told alike."""
    chosen = {**of_lineup(policy).settings, "steps": steps}
    return {**chosen, "numbers": numbers} if chosen.get("confidence") == "random" else chosen


class StepClock:
    """A hook of the engine that times steps: from the end of one to the end of the next.

    Attributes:
        steps: those with a pass, in their order.
    """

    def __init__(self):
        self.steps: list[StepTime] = []
        self._last = perf_counter()

    def __call__(self, engine: Engine, result: StepResult) -> None:
        synchronise(engine.model.device)
        now = perf_counter()
        if result.forward is not None:
            # The engine reads its next status after the hooks.
            self.steps.append(StepTime(engine.is_full, sum(engine.status.active), now - self._last))
        self._last = now


def generate(options: Options, policy: str, way: str, steps: int | None) -> Run:
    """A generation by dkv or by the eager baseline.

    Raises:
        ValueError: the baseline does not know the policy, or not for this model.
    """
    ids, new, settings = options.prompts(), options.new, settings_of(policy, steps)
    if way == "eager":
        found: list[StepTime] = []
        told = {"new": new, "on_step": lambda full, seconds: found.append(StepTime(full, None, seconds)), **settings}
        seconds, tokens = timed(partial(dkv_cache.generate, options.eager, ids, **told), ids.device)
        return Run(seconds, tokens[:, -new:], tuple(found))
    clock = StepClock()
    told = {"max_new_tokens": new, "seed": 0, "on_step": clock, **settings}
    seconds, output = timed(partial(replay, options.model, ids, **told), ids.device)
    return Run(seconds, output.sequences[:, -new:], tuple(clock.steps), output.stats.computed_share)


def measure(options: Options) -> dict[str, Any]:
    """Compare the policies of `options`.

    Returns:
        rows: one per policy and way ("dkv", or "eager", the baseline):
            seconds: of every round. tokens_per_second: the median, all rows of the batch.
            speed, slowest, fastest: median and range over the rounds of the seconds of dkv's plain run over
            its own. over_eager: the median of the baseline's seconds over its own, where there is a baseline.
            full_ms, cached_ms: median of a step. full_slots, cached_slots: slots that the median step sends
            through the network. full_passes, passes, computed_share: the work; that of the baseline is the
            same, as it has the same active slots.
            peak_mb: memory beyond the weights, of a run of few steps.
            same_tokens: share of equal tokens, with dkv's plain run; the baseline's with dkv's run of the
            policy, from which it may differ where two candidates are as good as equal.
            exact: share of all problems answered exactly.
        refused: why a policy has no baseline.
    """
    ways = ("dkv", "eager") if options.eager is not None else ("dkv",)
    contenders = {key: partial(generate, options, *key) for key in product(options.policies, ways)}
    total = len(contenders) * (2 + options.rounds) + len(options.policies) * (options.exam is not None)
    few, kind = min(4, options.steps or options.new), "cuda" if options.model.device.type == "cuda" else "cpu"
    with Bar(total, "run", pause=0) as bar:
        refused = _warm_up(contenders, options, bar)
        calls = {key: partial(run, options.steps) for key, run in contenders.items()}
        runs = in_turn(calls, options.rounds, bar, lambda n, key: f"round {n + 1} of {options.rounds}: {_called(key)}")
        calls = {key: partial(peak, partial(run, few), kind) for key, run in contenders.items()}
        peaks = in_turn(calls, 1, bar, lambda _, key: f"memory of {_called(key)}")
        calls = {policy: partial(_exact, options, policy) for policy in options.policies if options.exam is not None}
        exact = in_turn(calls, 1, bar, lambda _, policy: f"answers of {policy}")
    peaks, exact = {key: most / 1e6 for key, (most,) in peaks.items()}, {key: share for key, (share,) in exact.items()}
    return {"rows": rows(runs, options, peaks, exact), "refused": refused}


def _warm_up(contenders: dict[Key, Callable[[int], Run]], options: Options, bar: Bar) -> dict[str, str]:
    """Run all once, and take out those that refuse; why they do, by policy."""
    # On a CPU nothing is compiled, and the same canvas in few steps touches all there is.
    whole = options.steps or options.new
    steps = whole if options.model.device.type == "cuda" else min(whole, max(4, whole // 8))
    refused = {}
    for (policy, way), run in list(contenders.items()):
        bar.set_description(f"warm-up of {_called((policy, way))}")
        try:
            run(steps)
        except ValueError as error:
            if way == "dkv":
                raise
            refused[policy] = str(error)
            del contenders[policy, way]
        bar.update()
    bar.total -= len(refused) * (1 + options.rounds)
    return refused


def _called(key: Key) -> str:
    policy, way = key
    return f"{policy}, eager" if way == "eager" else policy


def _exact(options: Options, policy: str) -> float:
    """Share of the problems that are answered exactly."""
    sat = options.exam.sit(max_new_tokens=options.new, **settings_of(policy, options.steps))
    right = [mark for _, marks in sat for mark in marks]
    return sum(right) / len(right)


def rows(
    runs: dict[Key, list[Run]], options: Options, peaks: dict[Key, float], exact: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows that `measure` returns, from the runs of all contenders."""
    sizes = {
        "batch": options.batch,
        "prompt": options.prompt,
        "new": options.new,
        "steps": options.steps or options.new,
    }

    def ratios(of: Key, own: list[Run]) -> list[float]:
        return [a.seconds / b.seconds for a, b in zip(runs[of], own, strict=True)] if of in runs else []

    made = []
    for (policy, way), own in runs.items():
        first = runs[policy, "dkv"][0]
        other = runs["plain", "dkv"][0] if way == "dkv" else first
        speeds = ratios(("plain", "dkv"), own)
        row = {"policy": policy, "way": way, **sizes, "seconds": [run.seconds for run in own]}
        row["tokens_per_second"] = options.batch * options.new / statistics.median(row["seconds"])
        row |= {"speed": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds)}
        row["over_eager"] = _median(ratios((policy, "eager"), own) if way == "dkv" else [])
        counts = {}
        for kind, full in (("full", True), ("cached", False)):
            steps = [step for run in own for step in run.steps if step.full is full]
            row[f"{kind}_ms"] = _median(step.seconds * 1e3 for step in steps)
            row[f"{kind}_slots"] = _median(step.slots for step in first.steps if step.full is full)
            counts[kind] = len(steps)
        row |= {"full_passes": counts["full"] // len(own), "passes": sum(counts.values()) // len(own)}
        row |= {"computed_share": first.computed_share, "peak_mb": peaks.get((policy, way))}
        row["same_tokens"] = (own[0].tokens == other.tokens).double().mean().item()
        made.append(row | {"exact": exact.get(policy) if way == "dkv" else None})
    return made


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


# Speeds nearer to 1 than this say nothing.
CLEAR = 0.02
CELLS = {
    "policy": lambda row: row["policy"] if row["way"] == "dkv" else f"  {row['way']}",
    "tokens/s": "{tokens_per_second:.1f}",
    "speed": "{speed:.2f}x",
    "range": lambda row: f"{row['slowest']:.2f}-{row['fastest']:.2f}" if len(row["seconds"]) > 1 else "",
    "full ms": "{full_ms:.1f}",
    "cached ms": "{cached_ms:.1f}",
    "passes (full)": "{passes} ({full_passes})",
    "computed": "{computed_share:.0%}",
    "peak MB": "{peak_mb:.1f}",
    "same": "{same_tokens:.1%}",
    "exact": "{exact:.0%}",
    "over eager": "{over_eager:.2f}x",
}
MEANING = """\
speed: against dkv's plain run of the same round. full ms, cached ms: a step. computed: slots, against plain.
same: tokens as in dkv's plain run; eager: as in dkv's run of the policy."""


def table(found: dict[str, Any]) -> str:
    """All of a comparison: size, table and meaning of every batch, and why a policy has no baseline."""
    batches = dict.fromkeys(row["batch"] for row in found["rows"])
    parts = [one_batch([row for row in found["rows"] if row["batch"] == batch]) for batch in batches]
    return "\n".join(["\n\n".join(parts), *filter(None, [refusals(found["refused"])])])


def one_batch(rows: list[dict[str, Any]]) -> str:
    """What was compared, and what it gave."""
    row = rows[0]
    size = f"{row['prompt']} + {row['new']} slots, steps: {row['steps']}, batch: {row['batch']}"
    parts = (f"{size}, rounds: {len(row['seconds'])}", report.table(rows, CELLS), MEANING, verdict(rows))
    return "\n\n".join(parts)


def refusals(refused: dict[str, str]) -> str:
    """Why policies have no baseline, a line per reason; what was asked for is in the table."""
    reasons: dict[str, list[str]] = {}
    for policy, why in refused.items():
        reasons.setdefault(why.partition(", got ")[0], []).append(policy)
    return "\n".join(f"No eager baseline for {', '.join(names)}: {reason}" for reason, names in reasons.items())


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the rows of a comparison at one batch mean, in a few plain sentences."""
    own = {row["policy"]: row for row in rows if row["way"] == "dkv"}
    plain, cached, said = own["plain"], [row for name, row in own.items() if name != "plain"], []
    if cached:
        best = max(cached, key=lambda row: row["speed"])
        canvas = f"{plain['prompt']} + {plain['new']} slots at batch {plain['batch']}"
        said.append(f"Fastest for {canvas}: {best['policy']}, {best['speed']:.2f}x plain.")
    if cached and len(plain["seconds"]) == 1:
        # How much the runs vary is not known.
        said.append("One round cannot tell whether the cache pays: give --rounds 3.")
    elif cached:
        kinds = {"pays for": [], "does not pay for": [], "makes no clear difference for": []}
        for row in cached:
            unclear = "does not pay for" if row["fastest"] < 1 - CLEAR else "makes no clear difference for"
            kinds["pays for" if row["slowest"] > 1 + CLEAR else unclear].append(row["policy"])
        parts = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
        said.append(f"The cache {'; it '.join(parts)}.")
    if cached and plain["exact"] == 0:
        said.append("Plain answers none of the problems exactly: what a cache loses cannot be told from them.")
    elif cached and plain["exact"] is not None:
        good = [row for row in cached if row["exact"] >= plain["exact"]]
        name = max(good, key=lambda row: row["speed"])["policy"] if good else "none"
        exact = f"Plain answers {plain['exact']:.0%} exactly; the fastest that answers as many: {name}."
        said.append(f"{exact} Small losses take more problems to see: dkv eval.")
    over = [f"{name} {row['over_eager']:.2f}x" for name, row in own.items() if row["over_eager"] is not None]
    if over:
        said.append(f"Against the eager baseline of the same policy: {', '.join(over)}.")
    return "\n".join(said)
