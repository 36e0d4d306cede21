"""A whole data set answered, each line once, whatever happens meanwhile."""

import json
import secrets
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkv.common import process
from dkv.common.bar import Bar, counted
from dkv.common.journal import Journal, Record
from dkv.parallel import Lost
from dkv.serving.devices import Answer, Here, Processes, Task
from dkv.serving.filling import Asked
from dkv.serving.job import Job, Questions
from dkv.serving.lines import DataSet, Line

RESULTS = "results.jsonl"
# Failed lines that are told of; all have a record.
MOST_TOLD = 20


@dataclass
class Counts:
    """How many lines were answered, now and before, and how many have failed; tokens and seconds of now."""

    answered: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, record: Record) -> None:
        self.failed += "error" in record
        self.answered += "error" not in record

    def summary(self) -> str:
        """All of them in a few words."""
        lines = f"{counted(self.answered, 'answer')}, {self.failed} failed"
        if not self.tokens:
            return lines
        speed = self.tokens / max(self.seconds, 1e-9)
        return f"{lines}; {counted(self.tokens, 'new token')} in {self.seconds:.1f} s ({speed:.1f} tokens/s)"


class Run:
    """The lines of a data set, those that are done and those that are not.

    Args:
        data: all lines.
        job: what is asked for.
        out: folder of the results; None: they are kept in memory alone.
        option: by which the folder is named, for messages.
        progress: show how far it is, and tell of lines that fail.

    Attributes:
        counts: of the lines.
        journal: their records, where there is a folder.

    Raises:
        BlockingIOError: another process is at work in the folder.
        ValueError: a setting does not go with the model; the folder has results of another setting or data set.
        OSError: the model cannot be read, or the folder not be written.
    """

    def __init__(self, data: DataSet, job: Job, out: Path | None, option: str = "out", progress: bool = True):
        self.questions, self._progress, self._told = Questions(job), progress, 0
        self.lines = {line.number: line for line in data.lines}
        self.counts, self.journal = Counts(), None
        self._done: set[int] = set()
        self._records: dict[int, Record] = {}
        with ExitStack() as undo:
            if out is not None:
                self.journal = undo.enter_context(Journal(out / RESULTS, "line", option))
            found, given = self.journal.setting if self.journal else {}, job.config.seed
            self.questions.seed = found.get("seed", secrets.randbits(62)) if given is None else given
            self._setting = {**self.questions.setting, "data": f"{counted(len(self.lines), 'line')}, {data.digest}"}
            if self.journal:
                self.journal.check(self._setting)
                self.journal.read(self._find)
            undo.pop_all()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        """Let others have the folder."""
        if self.journal:
            self.journal.close()

    @property
    def done(self) -> int:
        """Lines that have a record."""
        return len(self._done)

    def records(self) -> list[Record]:
        """What became of the lines, in their order; when all are done."""
        found = dict(self._records)
        if self.journal:
            self.journal.read(lambda record: found.update({record["line"]: record}))
        return [found[number] for number in self.lines]

    def go(self) -> Counts:
        """Answer what is not answered.

        Raises:
            ChildProcessError: the process of a device has failed, or was killed.
            Lost: so has one of several that share the model.
            Exception: of the device.
        """
        began = time.perf_counter()
        asked, failed = self._read()
        try:
            with process.keeping(self._kept), ExitStack() as stack:
                devices = self._devices(asked, stack) if asked else None
                if self.journal:
                    self.journal.begin({**self._setting, **(devices.facts if devices else {})})
                for one in failed:
                    self._keep(one)
                if devices:
                    self._answer(devices, asked)
        except (ChildProcessError, Lost) as error:
            error.args = ("; ".join(filter(None, [str(error), self._kept()])),)
            raise
        self.counts.seconds = time.perf_counter() - began
        return self.counts

    def _read(self) -> tuple[list[Asked], list[Answer]]:
        """What is asked by the lines that are not done, and those of them that cannot be asked."""
        asked, failed, left = [], [], [line for number, line in self.lines.items() if number not in self._done]
        with Bar(len(left), "line", silent=not self._progress) as bar:
            bar.set_description("reading")
            for line in left:
                found = self.questions.asked(line)
                (asked if isinstance(found, Asked) else failed).append(found)
                bar.update()
        # The longest first: what needs most memory shows at once, and what ends last is short.
        asked.sort(key=lambda one: (-self.questions.needed(one), one.number))
        return asked, failed

    def _devices(self, asked: list[Asked], stack: ExitStack) -> Here | Processes:
        """The devices, with the model on each; stopped with the stack."""
        job, config = self.questions.job, self.questions.config
        length = max(map(self.questions.needed, asked))
        task = Task(job.model, dict(job.loading), config, length, len(asked), job.max_slots)
        if job.devices is None or len(job.devices) == 1:
            return Here(task, job.devices and job.devices[0])
        devices = stack.enter_context(Processes(task, job.devices))
        stack.enter_context(process.undoing(devices.stop))
        devices.begin()
        return devices

    def _answer(self, devices: Here | Processes, asked: list[Asked]) -> None:
        with Bar(len(asked), "line", silent=not self._progress) as bar:
            for one in devices.answers(asked):
                self._keep(one)
                bar.update()

    def _kept(self) -> str:
        """What somebody who stops now leaves."""
        return self.journal.kept() if self.journal else ""

    def _find(self, record: Record) -> None:
        """Take a line that the file has as done."""
        number = record["line"]
        if number not in self.lines or number in self._done:
            raise ValueError(number)
        self._done.add(number)
        self.counts.add(record)

    def _keep(self, found: Answer) -> None:
        """Write what became of a line."""
        line = self.lines[found.number]
        record = self.questions.record(line, found)
        if found.error is not None:
            self._tell(line, found.error)
        if self.journal:
            self.journal.add(record)
        else:
            self._records[line.number] = record
        self._done.add(line.number)
        self.counts.add(record)
        self.counts.tokens += found.stats.get("new_tokens", 0)

    def _tell(self, line: Line, error: str) -> None:
        """Say why a line has no answer, of the first ones."""
        self._told += 1
        if self._progress and self._told <= MOST_TOLD:
            named = "" if line.id in (None, line.number) else f" (id {json.dumps(line.id):.50})"
            more = "; others that fail have a record, and are not told" if self._told == MOST_TOLD else ""
            Bar.write(f"{process.name()}: line {line.number}{named}: {error}{more}", file=sys.stderr)
