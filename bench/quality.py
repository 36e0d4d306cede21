"""Exact answers and speed of many ways to generate, on problems with one right answer each.

The contenders take turns on every batch of problems, so that a machine that slows down slows all of
them. What a batch gave is a line of a file, and a repeated run takes up where the last one stopped.
"""

import hashlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dkv
from dkv.bench.contenders import PLAIN, Contender
from dkv.bench.intervals import paired, wilson
from dkv.common import files
from dkv.common.bar import Bar, counted
from dkv.tools.text import answer, encode

Row = dict[str, Any]
LOG = "runs.jsonl"


@dataclass(frozen=True)
class Problems:
    """A family of problems: prompts, their right answers, and the slots that an answer gets."""

    name: str
    prompts: Sequence[str]
    answers: Sequence[str]
    new: int


def bundled(names: Iterable[str], count: int, seed: int) -> list[Problems]:
    """`count` unseen problems of each of the bundled models' tasks."""
    from dkv.models.bundled.tasks import TASKS, held_out

    found = []
    for name in names:
        prompts, answers = zip(*held_out(count, seed, name), strict=True)
        found.append(Problems(name, prompts, answers, TASKS[name].new_tokens))
    return found


def from_file(path: Path, new: int, count: int | None = None) -> list[Problems]:
    """The problems of a JSON Lines file: objects with prompt and answer, and a task where there are several.

    Args:
        new: slots of every answer.
        count: at most so many per task; None: all.

    Raises:
        ValueError: a line is not such an object, or there is none; the message has its number.
    """
    tasks: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error})") from error
        texts = [row.get(key) for key in ("prompt", "answer")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f'{path} line {number} must be an object with texts "prompt" and "answer", got {line:.50}')
        tasks.setdefault(str(row.get("task", path.stem)), []).append(tuple(texts))
    if not tasks:
        raise ValueError(f"{path} holds no problems: one JSON object per line, with prompt and answer")
    return [Problems(name, *zip(*rows[:count], strict=True), new) for name, rows in tasks.items()]


@dataclass(frozen=True)
class Setting:
    """What the figures of a file depend on, beside the contenders."""

    model: Any
    tokenizer: Any
    problems: Sequence[Problems]
    batch: int
    seed: int
    chat: bool = False

    def rounds(self) -> list[tuple[Problems, int]]:
        """The batches: a family, and the place of the first problem."""
        return [(family, start) for family in self.problems for start in range(0, len(family.prompts), self.batch)]

    def run(self, contender: Contender, family: Problems, start: int) -> Row:
        """One batch by one contender."""
        stop = start + self.batch
        ids, mask = (t.to(self.model.device) for t in encode(self.tokenizer, family.prompts[start:stop], self.chat))
        output = dkv.generate(self.model, ids, mask, seed=self.seed, **contender.settings_for(family.new))
        rows = output.sequences[:, ids.shape[1] :].tolist()
        texts = [answer(self.tokenizer, self.model.spec, row).strip() for row in rows]
        right = family.answers[start:stop]
        return {
            "label": contender.label, "task": family.name, "start": start,
            "right": [text == one.strip() for text, one in zip(texts, right, strict=True)],
            "seconds": output.stats.seconds, "tokens": output.stats.new_tokens, "passes": output.stats.passes,
            "computed_slots": output.stats.computed_slots,
        }  # fmt: skip


def fingerprint(problems: Sequence[Problems]) -> str:
    """Of all texts and canvases."""
    text = json.dumps([[family.name, family.new, *family.prompts, *family.answers] for family in problems])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest(model: Any) -> str:
    """Of the weights that are not packed, the table of embeddings and the norms among them."""
    found = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        found.update(parameter.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return found.hexdigest()


class Log:
    """Finished runs, by contender, task and batch; kept in a file, if there is one.

    Attributes:
        runs: the last run by (label, task, start).
        plain_seconds: of plain decoding by (task, start, session), as times of two sessions are not compared.

    Raises:
        ValueError: the file holds runs of another setting, or is damaged.
    """

    def __init__(self, folder: Path | None, setting: dict[str, Any]):
        self.path = folder and folder / LOG
        self.runs: dict[tuple[str, str, int], Row] = {}
        self.plain_seconds: dict[tuple[str, int, float], float] = {}
        if self.path is not None and self.path.exists():
            self._read(setting)
        elif self.path is not None:
            files.write_json(self.path, {"setting": setting})

    def _read(self, setting: dict[str, Any]) -> None:
        # The last line has no end if the run was stopped while it was written.
        lines = self.path.read_text("utf-8").split("\n")[:-1]
        try:
            head, *runs = map(json.loads, lines)
            for run in runs:
                self._keep(run)
            found = head["setting"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not a log of dkv eval: give another --out, or remove it") from error
        if odd := [key for key in setting if found.get(key) != setting[key]]:
            wrong = f"{odd[0]} {found.get(odd[0])!r}, not {setting[odd[0]]!r}"
            raise ValueError(f"{self.path} has runs with {wrong}: give another --out, or remove it")
        files.write_text(self.path, "\n".join([*lines, ""]))

    def add(self, run: Row) -> None:
        self._keep(run)
        if self.path is not None:
            files.append_line(self.path, json.dumps(run))

    def kept(self) -> str:
        """What a stopped measurement leaves, and how to go on."""
        if self.path is None:
            return ""
        return f"{counted(len(self.runs), 'finished batch')} kept in {self.path}: repeat the command to go on"

    def _keep(self, run: Row) -> None:
        self.runs[run["label"], run["task"], run["start"]] = run
        if run["label"] == PLAIN:
            self.plain_seconds[run["task"], run["start"], run["session"]] = run["seconds"]


def measure(setting: Setting, contenders: Sequence[Contender], log: Log) -> list[Row]:
    """Every contender on every problem; what the log already has is not run again.

    Args:
        contenders: plain decoding first. It also runs where others still have to, as their yardstick.

    Returns:
        rows of the table, see `summary`.
    """
    session, todo = time.time(), []
    for family, start in setting.rounds():
        missing = [c for c in contenders if (c.label, family.name, start) not in log.runs]
        if missing:
            todo += [(contender, family, start) for contender in contenders if contender in (contenders[0], *missing)]
    if todo:
        # What is loaded and compiled at first use is not part of any contender's time.
        setting.run(*todo[0])
    with Bar(len(todo), "batch", pause=0) as bar:
        for contender, family, start in todo:
            bar.set_description(f"{family.name}, {contender.label}", refresh=False)
            log.add({**setting.run(contender, family, start), "session": session})
            bar.update()
    return [summary(contender, setting, log) for contender in contenders]


def summary(contender: Contender, setting: Setting, log: Log) -> Row:
    """A row of the table.

    Returns:
        label, policy, right and problems (numbers), by task too; exact, low and high (share answered exactly,
        and its 95 % interval); change, change_low, change_high (against plain on the same problems, in points);
        tokens_per_second (of new slots) and speed (against plain) from medians over batches;
        computed_share (slots computed, as a share of what plain decoding in one pass a slot computes).
    """
    places = [(family.name, start) for family, start in setting.rounds()]
    own = {place: log.runs[(contender.label, *place)] for place in places}
    plain = {place: log.runs[(PLAIN, *place)] for place in places}
    right, wanted = ([answer for run in runs.values() for answer in run["right"]] for runs in (own, plain))
    low, high = wilson(sum(right), len(right))
    tasks: dict[str, list[bool]] = {}
    seconds, yardstick = defaultdict(list), defaultdict(list)
    for (task, start), run in own.items():
        tasks.setdefault(task, []).extend(run["right"])
        seconds[task].append(run["seconds"])
        yardstick[task].append(log.plain_seconds[task, start, run["session"]])
    return {
        "label": contender.label, "policy": contender.policy, "settings": _plain(contender),
        "problems": len(right), "right": sum(right), "exact": sum(right) / len(right), "low": low, "high": high,
        **dict(zip(("change", "change_low", "change_high"), paired(right, wanted), strict=True)),
        "tasks": {name: sum(found) / len(found) for name, found in tasks.items()},
        "tokens_per_second": _sum(own, "tokens") / _typical(seconds),
        "speed": _typical(yardstick) / _typical(seconds),
        "computed_share": _sum(own, "computed_slots") / _sum(plain, "computed_slots"),
        "passes": _sum(own, "passes"),
    }  # fmt: skip


def _sum(runs: dict[Any, Row], name: str) -> int:
    return sum(run[name] for run in runs.values())


def _plain(contender: Contender) -> dict[str, Any]:
    cache = contender.settings.get("cache")
    own = {} if cache is None else {"cache": {"name": cache.name, **vars(cache)}}
    return {**contender.settings, **own, "steps": contender.steps}


def _typical(seconds: dict[str, list[float]]) -> float:
    """Of all batches; each counts as the median of its task's, so that a disturbed one does not show."""
    return sum(len(found) * statistics.median(found) for found in seconds.values())
