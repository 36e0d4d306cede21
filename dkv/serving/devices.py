"""Lines answered on devices: on one by this process, on several by a process each.

A process takes the next lines whenever rows of it are free, so that none waits for another. It hands its answers to
the one that started it, which alone writes.
"""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

import dkv
from dkv.common.process import USER_ERRORS, in_one_line
from dkv.engine.config import DiffusionConfig
from dkv.engine.inputs import check_settings
from dkv.models.digest import digest
from dkv.parallel import met
from dkv.serving import memory
from dkv.serving.filling import Asked, answered
from dkv.serving.llm import LLM
from dkv.serving.request import Request
from dkv.serving.shared import llm_of

# Of a request's statistics, what an answer keeps.
STATS = ("queued_seconds", "seconds", "passes", "new_tokens", "tokens_per_second")
# A process has a line more for every so many rows.
SPARE = 4
MOST_PROCESSES = 256


@dataclass(frozen=True)
class Task:
    """What a device is to do; it goes to other processes.

    Attributes:
        model: a name, or a model.
        loading: arguments of `dkv.load`.
        config: settings of all lines.
        length: slots of the longest line.
        count: of the lines.
        max_slots: of all rows; None: what a part of the free memory holds.
        threads: of torch; None: as they are.
    """

    model: Any
    loading: dict[str, Any]
    config: DiffusionConfig
    length: int
    count: int
    max_slots: int | None = None
    threads: int | None = None

    def begin(self, device: str | None) -> tuple[LLM, dict[str, Any]]:
        """Load the model, and make its rows; with what answers depend on.

        Raises:
            ValueError: a setting does not go with the model, or there are fewer slots than the longest line needs.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = self.model
        if isinstance(model, str | os.PathLike):
            ranks = met()
            model = dkv.load(model, device=None if ranks else device, ranks=ranks, **self.loading)
        check_settings(model, self.config)
        slots = self.max_slots
        if slots is None:
            slots = memory.slots_that_fit(model, self.length, self.config.kv_cache_dtype)
        # Rows that no line would take.
        slots = min(slots, self.count * self.length)
        llm = llm_of(model, max_slots=slots, max_length=self.length, generation_config=self.config)
        return llm, {"weights": digest(model), "dtype": str(model.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Answer:
    """What became of a line: tokens, and what they cost; or why there are none."""

    number: int
    tokens: list[int] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, number: int, found: Request | Exception) -> "Answer":
        if isinstance(found, Exception):
            return cls(number, error=in_one_line(found))
        stats = found.stats.to_dict()
        return cls(number, found.tokens.tolist(), {name: stats[name] for name in STATS})


def devices_of(given: int | str | Sequence[str] | None) -> list[str] | None:
    """Names of devices: of a number of GPUs, or of processes where there is none; of a list, or a text with commas.

    Raises:
        ValueError: there are none, or not so many.
    """
    if isinstance(given, str):
        given = int(given) if given.strip().isdecimal() else [name.strip() for name in given.split(",")]
    if given is None or not isinstance(given, int):
        if given is not None and not (given and all(given)):
            raise ValueError(f"devices must be names such as cuda:0,cuda:1, or a number, got {given!r}")
        return given and list(map(str, given))
    cards = torch.cuda.device_count()
    if not 1 <= given <= (cards or MOST_PROCESSES):
        there = f"there are {cards} GPUs" if cards else f"on a CPU at most {MOST_PROCESSES} processes are made"
        raise ValueError(f"devices must be at least 1, and {there}, got {given}")
    return [f"cuda:{number}" for number in range(given)] if cards else ["cpu"] * given


class Here:
    """A device that this process has.

    Attributes:
        facts: what answers depend on: weights and dtype.
    """

    def __init__(self, task: Task, device: str | None):
        self._llm, self.facts = task.begin(device)

    def answers(self, asked: Sequence[Asked]) -> Iterator[Answer]:
        for number, found in answered(self._llm, asked):
            yield Answer.of(number, found)


@dataclass
class DeviceProcess:
    """A process with a device, the pipe to it, its rows, and how many lines it has."""

    device: str
    process: Any
    pipe: Connection
    rows: int = 0
    has: int = 0


class Processes:
    """A process for each device; see `Here`. None of them outlives the context.

    Raises:
        ChildProcessError: one of them has failed, or was killed.
        ValueError: the devices compute in different dtypes.
    """

    def __init__(self, task: Task, devices: Sequence[str]):
        context = multiprocessing.get_context("spawn")
        # Processes on one CPU would be in each other's way.
        shared = [name for name in devices if name == "cpu"]
        task = replace(task, threads=max(torch.get_num_threads() // max(len(shared), 1), 1))
        self.facts: dict[str, Any] = {}
        self._workers: list[DeviceProcess] = []
        with _interrupts_later():
            for device in devices:
                mine, theirs = context.Pipe()
                process = context.Process(target=_work, args=(task, device, theirs), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(DeviceProcess(device, process, mine))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def begin(self) -> None:
        """Wait until all have loaded the model."""
        for worker in self._workers:
            worker.rows, facts = self._heard(worker)
            if self.facts and facts != self.facts:
                first = self._workers[0].device
                raise ValueError(f"{first} has {self.facts} and {worker.device} {facts}: give dtype")
            self.facts = facts

    def answers(self, asked: Sequence[Asked]) -> Iterator[Answer]:
        left, workers = deque(asked), {worker.pipe: worker for worker in self._workers}
        self._deal(left)
        while any(worker.has for worker in self._workers):
            for pipe in wait(list(workers)):
                found = self._heard(workers[pipe])
                workers[pipe].has -= len(found)
                self._deal(left)
                yield from found

    def _deal(self, left: deque[Asked]) -> None:
        """Hand on lines in turn: to each as many as it has rows, and a few that are there when a row is free."""
        dealt: list[list[Asked]] = [[] for _ in self._workers]
        room = [worker.rows + worker.rows // SPARE + 1 - worker.has for worker in self._workers]
        for turn in range(max(room)):
            for number, least in enumerate(room):
                if left and turn < least:
                    dealt[number].append(left.popleft())
        for worker, lines in zip(self._workers, dealt, strict=True):
            worker.has += len(lines)
            try:
                if lines:
                    worker.pipe.send(lines)
            except OSError:
                raise self._gone(worker) from None

    def stop(self) -> None:
        """End all of them at once: what they have is not written."""
        for worker in self._workers:
            with suppress(Exception):
                worker.process.kill()

    def _heard(self, worker: DeviceProcess) -> Any:
        """What a worker says next."""
        try:
            good, said = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._gone(worker) from None
        if not good:
            raise ChildProcessError(f"the process of {worker.device} has failed: {said}")
        return said

    def _gone(self, worker: DeviceProcess) -> ChildProcessError:
        worker.process.join(5)
        code = worker.process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"has ended with code {code}"
        return ChildProcessError(f"the process of {worker.device} {how}")


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Inside, an interrupt waits; a process that begins here has it wait, too, until it can be ignored."""
    block = getattr(signal, "pthread_sigmask", None)
    before = block and block(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if block:
            block(signal.SIG_SETMASK, before)


def _work(task: Task, device: str, pipe: Connection) -> None:
    """What a process does: answer lines, until nobody is there to take the answers."""
    # An interrupt in a terminal meets the one that started us, too, which ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its own lock is one between processes, and left behind by one that is killed.
    tqdm.set_lock(threading.RLock())
    arrived: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, arrived), daemon=True).start()
    try:
        llm, facts = task.begin(device)
        pipe.send((True, (llm.rows, facts)))
        for number, found in answered(llm, _arriving(llm, arrived)):
            pipe.send((True, [Answer.of(number, found)]))
    except Exception as error:
        if not isinstance(error, (*USER_ERRORS, torch.OutOfMemoryError)):
            traceback.print_exc()
        with suppress(OSError):
            pipe.send((False, in_one_line(error)))
        sys.exit(1)


def _listen(pipe: Connection, arrived: queue.SimpleQueue) -> None:
    """Take what is sent at once: who waits to send could not take answers meanwhile."""
    with suppress(EOFError, OSError):
        while True:
            for asked in pipe.recv():
                arrived.put(asked)
    # Whoever started us is done, or was killed: what we are at is nobody's.
    os._exit(0)


def _arriving(llm: LLM, arrived: queue.SimpleQueue) -> Iterator[Asked | None]:
    """What was sent; where there is other work, None for nothing yet."""
    while True:
        try:
            yield arrived.get(block=not (llm.running + llm.waiting))
        except queue.Empty:
            yield None
