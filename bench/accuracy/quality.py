"""Exact answers, likelihood and speed of many ways to generate.

The contenders take turns on every batch of problems, so that a machine that slows down slows all of
them. What a batch gave is a line of a file, and a repeated run takes up where the last one stopped.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dkv.bench.accuracy.intervals import difference, paired, wilson
from dkv.bench.contenders import Contender
from dkv.bench.lineup import PLAIN
from dkv.bench.problems import Exam, Family, fingerprint
from dkv.bench.timing import in_turn
from dkv.common.bar import Bar
from dkv.common.journal import Journal
from dkv.models.digest import digest

Row = dict[str, Any]
LOG = "runs.jsonl"


@dataclass(frozen=True)
class Setting:
    """What the figures of a file depend on, beside the contenders.

    Attributes:
        others: the same model with other weights, by their names in `dkv.bench.contenders.WEIGHTS`.
    """

    model: Any
    tokenizer: Any
    problems: Sequence[Family]
    batch: int
    seed: int
    chat: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)

    def rounds(self) -> list[tuple[Family, int]]:
        """The batches: a family, and the place of the first problem; the first of all families, then the second."""
        rounds = [(family, start) for family in self.problems for start in range(0, len(family.prompts), self.batch)]
        return sorted(rounds, key=lambda place: place[1])

    def run(self, contender: Contender, family: Family, start: int) -> Row:
        """One batch by one contender."""
        model = self.model if contender.weights is None else self.others[contender.weights]
        exam = Exam(model, self.tokenizer, family, self.chat)
        settings = {"seed": self.seed, **contender.settings_for(family.new)}
        output, marks = family.marked(exam, start, start + self.batch, **settings)
        stats = {name: getattr(output.stats, name) for name in ("seconds", "passes")}
        stats["computed_slots"] = output.stats.computed_work
        known = {"label": contender.label, "task": family.name, "start": start}
        return {**known, **marks, **stats, "tokens": output.stats.new_tokens}


def fixed(setting: Setting, facts: dict[str, Any]) -> dict[str, Any]:
    """What runs of one log have in common."""
    known = {name: facts[name] for name in ("model", "parameters", "dtype", "device", "batch", "seed")}
    return known | {"problems": fingerprint(setting.problems), "weights": digest(setting.model)}


class Log:
    """Finished runs, by contender, task and batch; kept in a file, if there is one.

    Attributes:
        runs: the last run by (label, task, start).
        plain_seconds: of plain decoding by (task, start, session), as times of two sessions are not compared.

    Raises:
        BlockingIOError: another process has the file.
        ValueError: the file holds runs of another setting, or is damaged.
    """

    def __init__(self, folder: Path | None, setting: dict[str, Any]):
        self.runs: dict[tuple[str, str, int], Row] = {}
        self.plain_seconds: dict[tuple[str, int, float], float] = {}
        self._journal = folder and Journal(folder / LOG, "finished batch", "--out")
        if self._journal:
            try:
                self._journal.begin(setting)
                self._journal.read(self._keep)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file."""
        if self._journal:
            self._journal.close()

    def add(self, run: Row) -> None:
        self._keep(run)
        if self._journal:
            self._journal.add(run)

    def has(self, label: str) -> bool:
        """Whether the contender has had a batch."""
        return any(known == label for known, *_ in self.runs)

    def kept(self) -> str:
        """What a stopped measurement leaves, and how to go on."""
        return self._journal.kept() if self._journal else ""

    def _keep(self, run: Row) -> None:
        self.runs[run["label"], run["task"], run["start"]] = run
        if run["label"] == PLAIN:
            self.plain_seconds[run["task"], run["start"], run["session"]] = run["seconds"]


def measure(
    setting: Setting, contenders: Sequence[Contender], log: Log, lost: Callable[[Row], bool] | None = None
) -> list[Row]:
    """Every contender on every problem; what the log already has is not run again.

    Args:
        contenders: plain decoding first. It also runs where others still have to, as their yardstick.
        lost: asked before every batch of each contender that has had one, with its row so far: whether it is left out
            of what follows.

    Returns:
        rows of the table, see `summary`.
    """
    session, todo, out = time.time(), [], set()
    for family, start in setting.rounds():
        missing = [c for c in contenders if (c.label, family.name, start) not in log.runs]
        if missing:
            todo.append((family, start, [c for c in contenders if c in (contenders[0], *missing)]))

    def add(contender: Contender, family: Family, start: int) -> None:
        log.add({**setting.run(contender, family, start), "session": session})

    with Bar(sum(len(chosen) for *_, chosen in todo), "batch", pause=0) as bar:
        if todo:
            # What is loaded and compiled at first use is not part of any contender's time.
            setting.run(contenders[0], *todo[0][:2])
        for family, start, chosen in todo:
            if lost is not None:
                begun = [c for c in chosen[1:] if c.label not in out and log.has(c.label)]
                out |= {c.label for c in begun if lost(summary(c, setting, log))}
            calls = {c.label: partial(add, c, family, start) for c in chosen if c.label not in out}
            in_turn(calls, bar=bar, told=lambda _, label, family=family: f"{family.name}, {label}")
            if len(calls) < len(chosen):
                bar.update(len(chosen) - len(calls))
    return [summary(contender, setting, log) for contender in contenders]


def summary(contender: Contender, setting: Setting, log: Log) -> Row:
    """A row of the table, of the batches that the contender has had.

    Returns:
        label, policy, settings; what `_answers` and `_texts` tell of what was written;
        tokens_per_second (of new slots) and speed (against plain) from medians over batches;
        computed_share (slots computed, as a share of what plain decoding in one pass a slot computes).
    """
    every = [(family.name, start) for family, start in setting.rounds()]
    places = [place for place in every if (contender.label, *place) in log.runs]
    own, plain = ([log.runs[(label, *place)] for place in places] for label in (contender.label, PLAIN))
    seconds, yardstick = defaultdict(list), defaultdict(list)
    for (task, start), run in zip(places, own, strict=True):
        seconds[task].append(run["seconds"])
        yardstick[task].append(log.plain_seconds[task, start, run["session"]])
    total = {name: sum(run[name] for run in own) for name in ("tokens", "computed_slots", "passes")}
    cache = contender.settings.get("cache")
    told = {} if cache is None else {"cache": {"name": cache.name, **vars(cache)}}
    return {
        "label": contender.label,
        "policy": contender.policy,
        "settings": {**contender.settings, **told, "steps": contender.steps, "weights": contender.weights},
        **_answers(own, plain),
        **_texts(own, plain),
        "tokens_per_second": total["tokens"] / _typical(seconds),
        "speed": _typical(yardstick) / _typical(seconds),
        "computed_share": total["computed_slots"] / sum(run["computed_slots"] for run in plain),
        "passes": total["passes"],
    }


def _all(runs: Sequence[Row], kind: str) -> list[Any]:
    return [mark for run in runs for mark in run.get(kind, ())]


def _answers(own: Sequence[Row], plain: Sequence[Row]) -> Row:
    """Of problems with a right answer.

    Returns:
        right and problems (numbers), and tasks (shares, by task); exact, low and high (share answered exactly,
        and its 95 % interval); change, change_low, change_high (against plain on the same problems, in points).
        Without such problems, two zeros and no tasks.
    """
    right, wanted = _all(own, "right"), _all(plain, "right")
    if not right:
        return {"problems": 0, "right": 0, "tasks": {}}
    tasks = defaultdict(list)
    for run in own:
        if "right" in run:
            tasks[run["task"]] += run["right"]
    low, high = wilson(sum(right), len(right))
    return {
        "problems": len(right),
        "right": sum(right),
        "exact": sum(right) / len(right),
        "low": low,
        "high": high,
        **dict(zip(("change", "change_low", "change_high"), paired(right, wanted), strict=True)),
        "tasks": {name: sum(found) / len(found) for name, found in tasks.items()},
    }


def _texts(own: Sequence[Row], plain: Sequence[Row]) -> Row:
    """Of texts that were gone on with.

    Returns:
        texts (number); nats (mean, a token), nats_change, nats_low, nats_high (against plain on the same texts, and
        the 95 % interval); repeated (mean share). Without such texts, a zero.
    """
    nats, wanted, repeated = _all(own, "nats"), _all(plain, "nats"), _all(own, "repeated")
    if not nats:
        return {"texts": 0}
    change = difference(nats, wanted)
    return {
        "texts": len(nats),
        "nats": statistics.fmean(nats),
        **dict(zip(("nats_change", "nats_low", "nats_high"), change, strict=True)),
        "repeated": statistics.fmean(repeated),
    }


def _typical(seconds: dict[str, list[float]]) -> float:
    """Of all batches; each counts as the median of its task's, so that a disturbed one does not show."""
    return sum(len(found) * statistics.median(found) for found in seconds.values())
