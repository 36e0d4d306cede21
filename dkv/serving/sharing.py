"""Requests of the same settings, which share passes."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dkv.core.kv_cache import KVCache
from dkv.engine.continuous import ContinuousBatch
from dkv.engine.engine import Engine
from dkv.engine.records import RECORDS
from dkv.engine.stages import StepResult
from dkv.parallel import ranks_of
from dkv.serving.request import FAILED, FINISHED, RUNNING, Request


class Sureness:
    """Keeps how sure every slot was in the pass that filled it: a hook of an engine.

    Attributes:
        values: float32 [B, S], logarithms of probabilities; None: nothing was filled yet.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def __call__(self, engine: Engine, result: StepResult) -> None:
        now, rows = RECORDS["confidences"](engine, result), engine.rows
        self.values = now if self.values is None else torch.where(rows.fresh, now, self.values)


class Sharing:
    """A batch, and the requests that have rows of it.

    From the device one thing is read a step, the status of all rows, which tells of each how many slots are without a
    token and which is the first of these. Tokens are read when requests end, once a step for all that do, and by
    `drafts`.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        slots: of a row.
        like: a request with the settings of all of them.
        cache: keys and values, of other batches, too.
        free: rows that no request has, of any batch.
    """

    def __init__(self, model: Any, rows: int, slots: int, like: Request, cache: KVCache | None, free: deque[int]):
        how = {"infill": like.gap is not None}
        self._sureness = Sureness() if like.wants_logprobs else None
        if self._sureness is not None:
            how["hooks"] = [self._sureness]
        self.batch = ContinuousBatch(model, rows, slots, like.config, like.processor, cache, **how)
        self.running: dict[int, Request] = {}
        self._free = free

    def start(self, requests: Sequence[Request]) -> list[Request]:
        """Give each of them a free row; returns those that failed."""
        rows, now = [self._free.popleft() for _ in requests], time.perf_counter()
        error = None
        try:
            self.batch.join(rows, [r.input_ids[0] for r in requests], [r.config for r in requests])
        except Exception as raised:
            error = raised
        check_common(self.batch.model, error)
        if error is not None:
            # Of one of them, or of a device without memory for all: others go on.
            self._free.extendleft(reversed(rows))
            if len(requests) > 1:
                return [failed for request in requests for failed in self.start([request])]
            requests[0].end(FAILED, error=error)
            return [*requests]
        for row, request in zip(rows, requests, strict=True):
            request.state, request.row, request.stats.started = RUNNING, row, now
            self.running[row] = request
        return []

    def step(self) -> list[Request]:
        """Take a step with all of them; returns those that ended."""
        batch, error, computed = self.batch, None, None
        if any(request.watched for request in self.running.values()):
            # One read for all, of a device that has nothing else to do yet. The next plan may be written over this one.
            computed = batch.next_plan.active.to("cpu", copy=True)
        try:
            if batch.numbers:
                batch.step()
        except Exception as raised:
            if ranks_of(batch.model) is not None:
                # Others may be in the middle of the step.
                raise
            # A processor's own, which has passes of its own; or a device's, which all meet.
            error = raised
        now, going, invalid = time.perf_counter(), set(batch.numbers), set(batch.invalid_rows)
        failed, finished = [], []
        for row, request in self.running.items():
            request.stats.passes += 1
            if request.watched:
                request.computed = computed[row, : request.stop]
            if error is not None or row in invalid:
                failed.append(request)
            elif row in going:
                request.settle(batch.status.first[row], now)
            else:
                finished.append(request)
        for request in failed:
            self.end(request, FAILED, error=error or ValueError(batch.sampler.suspects()))
        for request, tokens in zip(finished, self.drafts(finished), strict=True):
            # What ends a last block is filled with it, and not shown.
            filled = batch.rows.to_fill[request.row] - batch.status.cut[request.row]
            request.stats.new_tokens = min(filled, request.new)
            request.settle(request.stop, now)
            if self._sureness is not None:
                request.logprobs = self._sureness.values[request.row, request.start : request.stop].cpu()
            self.end(request, FINISHED, tokens=tokens)
        return failed + finished

    def drafts(self, requests: Sequence[Request]) -> list[Tensor]:
        """int64 [new] each on the CPU: what stands on the canvases of some of them now, in one read."""
        if not requests:
            return []
        first, last = min(r.row for r in requests), max(r.row for r in requests)
        begin, end = min(r.start for r in requests), max(r.stop for r in requests)
        read = self.batch.rows.tokens[first : last + 1, begin:end].to("cpu", copy=True)
        return [read[r.row - first, r.start - begin : r.stop - begin].clone() for r in requests]

    def end(self, request: Request, state: str, **how: Any) -> None:
        """Take the row of a request, which may be the next one's."""
        if state != FINISHED:
            self.batch.leave(request.row)
        del self.running[request.row]
        self._free.append(request.row)
        request.end(state, **how)


def check_common(model: Any, error: Exception | None) -> None:
    """Raise the error of a process that shares a model, unless all of them have met it: of what they were given.

    All call this, also those without an error, which hear of another's when they need it next.
    """
    ranks = ranks_of(model)
    if ranks is not None and not all(ranks.same(repr(error))) and error is not None:
        raise error
