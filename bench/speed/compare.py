"""Cache policies end to end, against plain decoding and against the eager baseline.

Every round runs each contender once, in turn, so that a machine that slows down slows all of them;
ratios are taken within a round. Time on an idle machine only.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dkv.bench.baselines import dkv_cache
from dkv.bench.contenders import of_lineup
from dkv.bench.options import Options
from dkv.bench.problems import BATCH
from dkv.bench.speed.allocations import peak
from dkv.bench.timing import in_turn, synchronise
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
# steps (None: one per slot) -> one generation in so many
Generation = Callable[[int | None], Run]


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
        if (forward := result.forward) is not None:
            self.steps.append(StepTime(forward.full, sum(forward.counts), now - self._last))
        self._last = now


def run_dkv(options: Options, policy: str, steps: int | None) -> Run:
    """A generation by dkv."""
    ids, settings = options.prompts(), settings_of(policy, steps)
    start, clock = perf_counter(), StepClock()
    output = replay(options.model, ids, on_step=clock, max_new_tokens=options.new, seed=0, **settings)
    seconds = perf_counter() - start
    return Run(seconds, output.sequences[:, options.prompt :], tuple(clock.steps), output.stats.computed_share)


def run_eager(options: Options, policy: str, steps: int | None) -> Run:
    """A generation by the eager baseline.

    Raises:
        ValueError: the baseline does not know the policy, or not for this model.
    """
    ids, found = options.prompts(), []
    synchronise(ids.device)
    start = perf_counter()
    told = {"new": options.new, "on_step": lambda full, seconds: found.append(StepTime(full, None, seconds))}
    sequences = dkv_cache.generate(options.eager, ids, **told, **settings_of(policy, steps))
    synchronise(ids.device)
    return Run(perf_counter() - start, sequences[:, -options.new :], tuple(found))


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
    ways = {"dkv": run_dkv} | ({"eager": run_eager} if options.eager is not None else {})
    contenders: dict[Key, Generation] = {
        (policy, way): partial(run, options, policy) for policy in options.policies for way, run in ways.items()
    }
    total = len(contenders) * (2 + options.rounds) + len(options.policies) * (options.exam is not None)
    few = min(4, options.steps or options.new)
    with Bar(total, "run", pause=0) as bar:
        refused = _warm_up(contenders, options, bar)
        calls = {key: partial(run, options.steps) for key, run in contenders.items()}
        runs = in_turn(calls, options.rounds, bar, lambda n, key: f"round {n + 1} of {options.rounds}: {_called(key)}")
        calls = {key: partial(_peak, options.model.device, partial(run, few)) for key, run in contenders.items()}
        peaks = in_turn(calls, 1, bar, lambda _, key: f"memory of {_called(key)}")
        calls = {policy: partial(_exact, options, policy) for policy in options.policies if options.exam is not None}
        exact = in_turn(calls, 1, bar, lambda _, policy: f"answers of {policy}")
    peaks, exact = ({key: found for key, (found,) in every.items()} for every in (peaks, exact))
    return {"rows": rows(runs, options, peaks, exact), "refused": refused}


def _warm_up(contenders: dict[Key, Generation], options: Options, bar: Bar) -> dict[str, str]:
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


def _peak(device: torch.device, call: Callable[[], Any]) -> float | None:
    """Most megabytes that `call` held at once beyond what was there before; None where nothing counts them."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return peak(call) / 1e6


def _exact(options: Options, policy: str) -> float:
    """Share of the problems that are answered exactly."""
    exam, settings = options.exam, settings_of(policy, options.steps)
    count, right = len(exam.problems.answers), 0
    for start in range(0, count, BATCH):
        _, marks = exam.marks(start, start + BATCH, max_new_tokens=options.new, **settings)
        right += sum(marks)
    return right / count


def rows(
    runs: dict[Key, list[Run]], options: Options, peaks: dict[Key, float], exact: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows that `measure` returns, from the runs of all contenders."""
    made = []
    for (policy, way), own in runs.items():
        twin = runs[policy, "dkv"]
        other = runs["plain" if way == "dkv" else policy, "dkv"]
        ratios = _ratios(runs["plain", "dkv"], own)
        over = _ratios(runs[policy, "eager"], own) if way == "dkv" and (policy, "eager") in runs else None
        typical = statistics.median(run.seconds for run in own)
        full, cached = ([step for run in own for step in run.steps if step.full is kind] for kind in (True, False))
        made.append(
            {
                "policy": policy,
                "way": way,
                "batch": options.batch,
                "prompt": options.prompt,
                "new": options.new,
                "steps": options.steps or options.new,
                "seconds": [run.seconds for run in own],
                "tokens_per_second": options.batch * options.new / typical,
                "speed": statistics.median(ratios),
                "slowest": min(ratios),
                "fastest": max(ratios),
                "over_eager": statistics.median(over) if over else None,
                "full_ms": _median(step.seconds * 1e3 for step in full),
                "cached_ms": _median(step.seconds * 1e3 for step in cached),
                "full_slots": _median(step.slots for step in twin[0].steps if step.full),
                "cached_slots": _median(step.slots for step in twin[0].steps if not step.full),
                "full_passes": len(full) // len(own),
                "passes": (len(full) + len(cached)) // len(own),
                "computed_share": twin[0].computed_share,
                "peak_mb": peaks.get((policy, way)),
                "same_tokens": (own[0].tokens == other[0].tokens).double().mean().item(),
                "exact": exact.get(policy) if way == "dkv" else None,
            }
        )
    return made


def _ratios(of: Sequence[Run], over: Sequence[Run]) -> list[float]:
    return [a.seconds / b.seconds for a, b in zip(of, over, strict=True)]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
