"""A model that is asked many things at once: requests join and leave between two steps.

>>> llm = dkv.LLM(model, cache=dkv.DecodeCache(refresh=8))
>>> requests = llm.generate([ids, other_ids], max_new_tokens=64)
>>> requests[0].tokens, requests[0].stats.to_dict()
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dkv.common.bar import Bar
from dkv.core.kv_cache import KVCache
from dkv.core.validation import whole
from dkv.engine.config import DiffusionConfig
from dkv.engine.continuous import ContinuousBatch, slots_needed
from dkv.engine.generate import config_of
from dkv.engine.inputs import checked_inputs
from dkv.engine.run import drawn_seeds, listed_processors
from dkv.engine.settings import BY_ROW
from dkv.models.gemma import Gemma
from dkv.serving import memory
from dkv.serving.request import CANCELLED, FAILED, FINISHED, RUNNING, Request, one_row

# Batches of other settings that are kept without a request, for the next ones like theirs.
MOST_IDLE = 4
# What a generation can give beside its tokens, and a request cannot.
RECORDS = ("output_history", "output_active", "output_confidences", "output_logits")


class Full(RuntimeError):
    """As many requests wait as may."""


class LLM:
    """Serves requests from rows that they share; each gets the tokens that it gets alone.

    Requests of the same settings share passes; those of other settings, or with a logits processor, have passes of
    their own, in turn. All of them share the rows of one buffer of keys and values, first come first served. It is to
    be used from one thread.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        max_slots: of the buffer, all rows; default: what three quarters of the free memory of a GPU hold, or a quarter
            of that of a computer, and at most 64 rows.
        max_length: slots of a row, prompt and answer; default: 2,048, or as many positions as the model has.
        max_waiting: requests that may wait at most; default: any number.
        generation_config, settings: of requests that do not say otherwise.

    Raises:
        TypeError, ValueError: a model or a setting that is none, or fewer slots than a row has.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_slots: int | None = None,
        max_length: int | None = None,
        max_waiting: int | None = None,
        generation_config: DiffusionConfig | None = None,
        **settings: Any,
    ):
        if isinstance(model, Gemma):
            raise ValueError("DiffusionGemma changes its whole canvas in every step: use dkv.generate")
        self.model, self.config = model, config_of(generation_config, settings)
        longest = model.spec.max_positions
        self.max_length = min(2048, longest) if max_length is None else max_length
        whole("max_length", self.max_length, 1, longest)
        if max_waiting is not None:
            whole("max_waiting", max_waiting, 0)
        self.max_waiting = max_waiting
        if max_slots is None:
            max_slots = memory.slots_that_fit(model, self.max_length)
        whole("max_slots", max_slots, 1)
        self.rows = max_slots // self.max_length
        if not self.rows:
            raise ValueError(
                f"max_slots ({max_slots}) must be at least max_length ({self.max_length}), the slots of one row: give "
                "a smaller max_length, or a larger max_slots"
            )
        self._cache = KVCache(self.rows, self.max_length, grows=model.spec.attention != "full")
        self._free = deque(range(self.rows))
        self._waiting: deque[Request] = deque()
        self._batches: dict[str, ContinuousBatch] = {}
        self._running: dict[str, dict[int, Request]] = {}
        self._count = 0

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a row."""
        return self.rows - len(self._free)

    @torch.no_grad()
    def add(
        self,
        input_ids: Tensor | Sequence[int] | Mapping,
        *,
        generation_config: DiffusionConfig | None = None,
        logits_processor: Any = None,
        **settings: Any,
    ) -> Request:
        """Ask for an answer; it is worked on by `step`.

        Args:
            input_ids: the prompt, [P] or [1, P], a list of ids, or the encoding of a tokenizer.
            generation_config: settings; default: those of the `LLM`.
            logits_processor: as for `dkv.generate`. The request then has passes of its own.
            settings: that replace those of the configuration. Seeds that are not given are drawn.

        Raises:
            Full: `max_waiting` requests wait already.
            TypeError, ValueError, IndexError: the input or a setting is impossible, or it needs more slots than a row
                has.
        """
        if self.max_waiting is not None and self.waiting - len(self._free) >= self.max_waiting:
            raise Full(f"{self.waiting} requests wait already, and max_waiting is {self.max_waiting}: ask again later")
        request = self._request(input_ids, generation_config, logits_processor, settings)
        self._waiting.append(request)
        return request

    def _request(self, input_ids: Any, given: DiffusionConfig | None, processor: Any, settings: dict) -> Request:
        """A request that can be, which does not wait yet."""
        config = config_of(given or self.config, settings)
        for name in RECORDS:
            if getattr(config, name):
                raise ValueError(f"{name} does not go with requests, which tell their tokens alone: use dkv.generate")
        if config.schedule == "speculative":
            raise ValueError('schedule="speculative" does not go with requests yet: use dkv.generate')
        ids, _ = checked_inputs(self.model, one_row(input_ids).to(self.model.device), None, config)
        needed = slots_needed(self.model, ids, config)
        if needed > self.max_length:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and its answer need {needed} slots, and a row has "
                f"{self.max_length}: give fewer tokens, or make the LLM with a larger max_length"
            )
        config.update(seed=drawn_seeds(config.seed, 1, None))
        self._count += 1
        request = Request(self._count - 1, ids, config, listed_processors(processor))
        shared = {name: value for name, value in config.settings().items() if name not in (*BY_ROW, "max_length")}
        request.key = repr((shared, None if request.processor is None else request.number))
        return request

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Give free rows to those that wait, and take a step with all that have one; returns those that ended."""
        ended: list[Request] = []
        while self._free and self._waiting:
            self._start(self._waiting.popleft(), ended)
        for key, batch in self._batches.items():
            if self._running[key]:
                ended += self._step(key, batch)
        self._forget()
        return ended

    def cancel(self, request: Request) -> None:
        """Let a request go; nothing happens to one that is done."""
        if request in self._waiting:
            self._waiting.remove(request)
            request.end(CANCELLED)
        elif request.state == RUNNING:
            self._end(request, CANCELLED, tokens=self.draft(request))

    def draft(self, request: Request) -> Tensor:
        """int64 [new] on the CPU: what stands on the canvas of a request, the mask id where there is no token yet."""
        if request.tokens is not None:
            return request.tokens
        start, new = request.input_ids.shape[1], request.new
        if request.row is None:
            mask_id = request.config.mask_token_id
            return torch.full((new,), self.model.spec.mask_token_id if mask_id is None else mask_id)
        batch = self._batches[request.key]
        return batch.rows.tokens[request.row, start : start + new].to("cpu", copy=True)

    def generate(
        self,
        prompts: Iterable[Any],
        *,
        own: Iterable[Mapping[str, Any]] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> list[Request]:
        """Answer prompts, as many of them at a time as there are rows.

        Args:
            prompts: each as for `add`.
            own: settings that each of them has beside the others, prompt by prompt.
            progress: show a bar where there is a terminal.
            settings: of all of them.

        Returns:
            The requests in the order of the prompts, all of them done; one that failed has an `error`.

        Raises:
            TypeError, ValueError, IndexError: one of them cannot be; none is worked on then.
        """
        prompts = list(prompts)
        asked = [
            self._request(prompt, None, None, {**settings, **more})
            for prompt, more in zip(prompts, [{}] * len(prompts) if own is None else own, strict=True)
        ]
        left, going = deque(asked), set(asked)
        with Bar(len(asked), "request", silent=not progress) as bar:
            while going:
                while left and self.waiting < len(self._free):
                    left[0].stats.arrived = time.perf_counter()
                    self._waiting.append(left.popleft())
                done = going.intersection(self.step())
                going -= done
                bar.update(len(done))
        return asked

    def _start(self, request: Request, ended: list[Request]) -> None:
        """Give a request a free row."""
        row, key = self._free.popleft(), request.key
        request.state, request.row, request.stats.started = RUNNING, row, time.perf_counter()
        try:
            if key not in self._batches:
                # With guidance a row has keys and values in two branches.
                cache = None if request.config.cfg_scale else self._cache
                size = self.model, self.rows, self.max_length, request.config, request.processor
                self._batches[key], self._running[key] = ContinuousBatch(*size, cache=cache), {}
            self._batches[key].join(row, request.input_ids, request.config)
            self._running[key][row] = request
        except Exception as error:
            # Of the request, or of a device without memory: others go on.
            self._free.append(row)
            request.end(FAILED, error=error)
            ended.append(request)

    def _step(self, key: str, batch: ContinuousBatch) -> list[Request]:
        """A step of the requests with these settings; returns those that ended."""
        running, error, computed = self._running[key], None, None
        if any(request.watched for request in running.values()):
            # Where steps are replayed, the next plan is written over this one.
            computed = batch.next_plan.active.clone()
        try:
            if batch.numbers:
                batch.step()
        except Exception as raised:
            # A processor's own, which has passes of its own; or a device's, which all meet.
            error = raised
        ended, going = [], set(batch.numbers)
        for row, request in list(running.items()):
            request.stats.passes += 1
            if request.watched and computed is not None:
                request.computed = computed[row, : request.input_ids.shape[1] + request.new]
            if error is not None or row in batch.invalid_rows:
                self._end(request, FAILED, error=error or ValueError(batch.sampler.suspects()))
            elif row not in going:
                # What ends a last block is filled with it, and not shown.
                filled = batch.rows.to_fill[row] - batch.status.cut[row]
                request.stats.new_tokens = min(filled, request.new)
                self._end(request, FINISHED, tokens=self.draft(request))
            if request.done:
                ended.append(request)
        self._note_first_tokens(batch, running)
        return ended

    def _note_first_tokens(self, batch: ContinuousBatch, running: Mapping[int, Request]) -> None:
        """See which requests have a token in their first slot to fill by now."""
        without = [(row, request) for row, request in running.items() if request.stats.first_token is None]
        if not without:
            return
        rows, slots = ([*x] for x in zip(*((row, r.input_ids.shape[1]) for row, r in without), strict=True))
        masked, now = batch.rows.masked[rows, slots].tolist(), time.perf_counter()
        for (_, request), waits in zip(without, masked, strict=True):
            request.stats.first_token = None if waits else now

    def _end(self, request: Request, state: str, **how: Any) -> None:
        """Take the row of a request, which may be the next one's."""
        row = request.row
        self._batches[request.key].leave(row)
        del self._running[request.key][row]
        self._free.append(row)
        request.end(state, **how)
        if state == FINISHED and request.stats.first_token is None:
            request.stats.first_token = request.stats.ended

    def _forget(self) -> None:
        """Let go of batches that nobody asks, but for the last ones."""
        idle = [key for key, running in self._running.items() if not running]
        for key in idle[: max(len(idle) - MOST_IDLE, 0)]:
            del self._batches[key], self._running[key]
