"""One request of a client, between the event loop and the thread of the model."""

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from dkv.serving.draft import Drafted, Watch
from dkv.serving.protocol import Asked, Served
from dkv.serving.replies import Refusal, usage
from dkv.serving.request import CANCELLED, FAILED, FINISHED
from dkv.serving.worker import REFUSED, Crowded, Job, Stopped, Told, Worker

LOG = logging.getLogger("dkv.serving")


class Answer:
    """The choices of a request, as the worker tells of them; to be made and used on an event loop.

    Of each choice the last thing told is kept, and no more: a reader that is slow costs no memory.

    Raises:
        Crowded, Stopped: the worker does not take it.
    """

    def __init__(self, worker: Worker, asked: Asked, served: Served):
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._told: dict[int, Told] = {}
        self._news = asyncio.Event()
        self._read, self.written = asked.read, asked.written(served)
        # How likely tokens were is told at the end alone; stop strings cut the text then, too.
        heard, mask_id = asked.stream or bool(asked.stops and not asked.logprobs), served.spec.mask_token_id
        self._jobs = [
            Job(ids, config, partial(self._hear, number), heard, Watch(mask_id) if asked.draft else None, asked.how)
            for number, (ids, config) in enumerate(asked.choices)
        ]
        self._drafted = [Drafted(served.tokenizer, served.spec, len(ids)) for ids, _ in asked.choices]
        worker.submit(self._jobs)

    def _hear(self, number: int, told: Told) -> None:
        """Hand on what is told on the worker's thread."""
        # The loop may be closed when a server stops at once.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note, number, told)

    def _note(self, number: int, told: Told) -> None:
        self._told[number] = told
        self._news.set()

    async def taken(self) -> None:
        """Wait until the worker has taken all choices.

        Raises:
            Exception: why one is refused.
        """
        while len(self._told) < len(self._jobs):
            await self._news.wait()
            self._news.clear()
        # They are looked at once more by `pieces`.
        self._news.set()
        for told in self._told.values():
            if told.state == REFUSED:
                raise _refusal(told)

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None, dict[str, Any] | None]]:
        """What is new: the number of a choice, text, with the last one why it ended, and the draft if it was asked for.

        Raises:
            Refusal: it failed, or was cancelled.
        """
        while any(written.finish is None for written in self.written):
            await self._news.wait()
            self._news.clear()
            told, self._told = self._told, {}
            for number, one in told.items():
                written = self.written[number]
                if written.finish is not None:
                    continue
                if one.state in (REFUSED, FAILED, CANCELLED):
                    raise _refusal(one)
                text = written.take(one.tokens, last=one.state == FINISHED)
                if one.logprobs:
                    written.note_logprobs(one.tokens, one.logprobs)
                if written.finish is not None and one.state != FINISHED:
                    self._worker.cancel([self._jobs[number]])
                draft = one.draft and self._drafted[number].take(one.draft, len(one.tokens))
                if draft is not None and one.state == FINISHED:
                    draft["stats"] = self._jobs[number].request.stats.to_dict()
                if text or draft is not None or written.finish is not None:
                    yield number, text, written.finish, draft

    def leave(self) -> None:
        """Let go of what is not finished."""
        self._worker.cancel(self._jobs)

    @property
    def usage(self) -> dict[str, int]:
        """What was read and written."""
        return usage(self._read, sum(written.tokens for written in self.written))


def _refusal(told: Told) -> Exception:
    """Why a choice was not answered."""
    if told.state == CANCELLED:
        return Refusal(503, "the request was cancelled")
    if told.state == REFUSED and isinstance(told.error, (ValueError, TypeError, IndexError)):
        return Refusal(400, " ".join(str(told.error).split()))
    return told.error if isinstance(told.error, Exception) else RuntimeError(told.state)


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error. Faults are logged, without their messages: a prompt may be in them."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Crowded):
        return Refusal(429, str(error), code="queue_full", **{"Retry-After": str(error.seconds)})
    if isinstance(error, Stopped):
        return Refusal(503, str(error), code="stopped")
    where = "".join(traceback.format_tb(error.__traceback__))
    LOG.error("a request failed: %s\n%s", type(error).__name__, where)
    return Refusal(500, "the request failed: the server's log says where")
