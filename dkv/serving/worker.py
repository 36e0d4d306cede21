"""A thread that owns an `LLM`, and steps it while there is work."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dkv.engine.config import DiffusionConfig
from dkv.parallel import Lost
from dkv.serving.draft import Draft, Watch
from dkv.serving.llm import LLM
from dkv.serving.request import CANCELLED, FAILED, FINISHED, Request

# Beside the states of a request: it never became one.
REFUSED = "refused"
# Of the time that answers take, what the last one is worth in the mean; and the most that a client is told to wait.
NEWEST, LONGEST_WAIT = 0.2, 60


class Stopped(RuntimeError):
    """The thread takes no more work: it ends, or has failed."""


class Crowded(RuntimeError):
    """There is no room for more work.

    Args:
        message: one sentence.
        seconds: after which it may be worth asking again.
    """

    def __init__(self, message: str, seconds: int):
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Told:
    """What is told of a job.

    Attributes:
        state: of its request, or `REFUSED`.
        tokens: the new ones before its first mask, which stay as they are; of a finished one all.
        error: why it was refused, or failed.
        draft: the whole answer as it stands, for a job that asked for it.
        logprobs: of a finished one, if it asked for them, one for each token.
    """

    state: str
    tokens: Sequence[int] = ()
    error: BaseException | None = None
    draft: Draft | None = None
    logprobs: Sequence[float] = ()


@dataclass(eq=False)
class Job:
    """A request on its way to the thread, which alone changes it.

    Attributes:
        input_ids: the prompt.
        config: its settings.
        tell: called on the thread when the request was taken or refused, when it ended, and with `drafts` whenever more
            tokens stand before the first mask. It must return at once, and raise nothing.
        drafts: whether it wants to hear before the end.
        watch: of the whole draft, if it wants to hear of it in every step.
        how: further arguments of `LLM.add`.
        told: tokens before the first mask that were told of.
    """

    input_ids: Sequence[int]
    config: DiffusionConfig
    tell: Callable[[Told], None]
    drafts: bool = False
    watch: Watch | None = None
    how: Mapping[str, bool] = field(default_factory=dict)
    request: Request | None = None
    told: int = 0

    @property
    def settled(self) -> int:
        """How many tokens stay as they are. What may be edited does not stand before its end."""
        return 0 if self.request.config.edit_threshold is not None else self.request.settled

    @property
    def has_news(self) -> bool:
        """Whether it wants to hear of the step that was taken."""
        return self.request.row is not None and (self.watch is not None or (self.drafts and self.settled > self.told))


class Worker:
    """Steps an `LLM` on a thread of its own; all methods may be called from any other.

    Args:
        llm: that nobody else uses from now on.
        max_waiting: jobs that there may be beyond the rows of `llm`.

    Attributes:
        error: why the thread ended, if it was not told to.
        on_end: called on the thread with every job that has ended and what is told of it.
    """

    def __init__(self, llm: LLM, max_waiting: int):
        self.llm, self.room = llm, llm.rows + max_waiting
        self.error: BaseException | None = None
        self.on_end: Callable[[Job, Told], None] | None = None
        self._row_seconds = 0.0
        self._change = threading.Condition()
        self._arrived: list[Job] = []
        self._leaving: list[Job] = []
        self._jobs: dict[Request, Job] = {}
        self._open: set[Job] = set()
        self._draining = False
        # A daemon: a process that is to stop at once does not wait for it.
        self._thread = threading.Thread(target=self._run, name="dkv-worker", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        """Jobs that have not ended."""
        return len(self._open)

    def seconds_until_room(self, jobs: int) -> int:
        """About how long it takes until there is room for so many jobs, by the time that jobs have had a row lately."""
        missing = max(self.open + jobs - self.room, 1)
        return min(max(math.ceil(missing * self._row_seconds / self.llm.rows), 1), LONGEST_WAIT)

    @property
    def draining(self) -> bool:
        """Whether no more jobs are taken."""
        return self._draining

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand jobs over, all of them or none.

        Raises:
            Crowded: there are too many already.
            Stopped: the thread has ended, or is about to.
        """
        with self._change:
            if self.error is not None:
                raise Stopped("the model has failed: the server must be started anew")
            if self._draining:
                raise Stopped("the server is stopping")
            if self.open + len(jobs) > self.room:
                said = f"{self.open} requests are open, and there is room for {self.room}: ask again later"
                raise Crowded(said, self.seconds_until_room(len(jobs)))
            self._open.update(jobs)
            self._arrived += jobs
            self._change.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Let jobs go; nothing happens to those that have ended."""
        with self._change:
            self._leaving += [job for job in jobs if job in self._open]
            self._change.notify()

    def stop(self) -> None:
        """Take no more jobs, let go of those that are open, and return when the thread has ended."""
        with self._change:
            self._draining = True
            self._leaving += self._open
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self.llm.close()
        except BaseException as error:
            with self._change:
                self.error, left = error, list(self._open)
            said = Stopped("the model has failed: another process that had a part of it has gone")
            for job in left:
                self._end(job, Told(FAILED, error=said if isinstance(error, Lost) else error))

    def _turn(self) -> bool:
        """Wait for work, and take a step; False: there is none left, and there will be none."""
        with self._change:
            self._change.wait_for(lambda: self._arrived or self._leaving or self._jobs or self._draining)
            arrived, self._arrived = self._arrived, []
            leaving, self._leaving = self._leaving, []
            if not (arrived or leaving or self._jobs):
                return False
        for job in arrived:
            self._add(job)
        for job in leaving:
            self._leave(job)
        if self._jobs:
            self._step()
        return True

    def _add(self, job: Job) -> None:
        try:
            job.request = self.llm.add(job.input_ids, generation_config=job.config, **job.how)
        except Exception as error:
            # Nothing of it is in the model yet: the others go on.
            self._end(job, Told(REFUSED, error=error))
            return
        job.request.watched = job.watch is not None
        self._jobs[job.request] = job
        job.tell(Told(job.request.state))

    def _leave(self, job: Job) -> None:
        if job.request in self._jobs:
            self.llm.cancel(job.request)
            self._end(job, Told(CANCELLED))

    def _step(self) -> None:
        for request in self.llm.step():
            tokens = [] if request.tokens is None else request.tokens.tolist()
            # What fails before its first pass has settings that cannot be.
            state = REFUSED if request.state == FAILED and not request.stats.passes else request.state
            job, logprobs = self._jobs[request], [] if request.logprobs is None else request.logprobs.tolist()
            self._end(job, Told(state, tokens, request.error, self._draft(job, tokens), logprobs))
        news = [job for job in self._jobs.values() if job.has_news]
        drafts = self.llm.drafts([job.request for job in news])
        for job, tokens in zip(news, drafts, strict=True):
            self._tell_draft(job, tokens.tolist())

    def _tell_draft(self, job: Job, tokens: list[int]) -> None:
        """Tell what stands before the first mask, and the whole draft if it is wanted."""
        job.told = job.settled
        job.tell(Told(job.request.state, tokens[: job.settled], draft=self._draft(job, tokens)))

    def _draft(self, job: Job, tokens: list[int]) -> Draft | None:
        """The whole draft after a step, for those that asked for it."""
        request = job.request
        if job.watch is None or not tokens or request.computed is None:
            return None
        return job.watch.after(request.stats.passes, tokens, request.computed.tolist())

    def _end(self, job: Job, told: Told) -> None:
        """Let a job go, and tell of it."""
        self._jobs.pop(job.request, None)
        with self._change:
            self._open.discard(job)
        if told.state == FINISHED:
            held = job.request.stats.seconds - job.request.stats.queued_seconds
            self._row_seconds += (held - self._row_seconds) * (NEWEST if self._row_seconds else 1)
        if self.on_end is not None:
            self.on_end(job, told)
        job.tell(told)


def describe(worker: Worker) -> dict[str, Any]:
    """How a worker is, as plain values."""
    state = "failed" if worker.error is not None else "stopping" if worker.draining else "ok"
    return {"status": state, "open": worker.open, "rows": worker.llm.rows, "room": worker.room}
