"""A model that is asked many things at once: requests join and leave between two steps.

>>> llm = dkv.LLM(model, cache=dkv.DecodeCache(refresh=8))
>>> requests = llm.generate([ids, other_ids], max_new_tokens=64)
>>> requests[0].tokens, requests[0].stats.to_dict()
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dkv.common.bar import Bar
from dkv.core.kv_cache import KVCache
from dkv.core.validation import whole
from dkv.engine.config import DiffusionConfig
from dkv.engine.generate import config_of, infill_config
from dkv.engine.output import Stats
from dkv.engine.run import circumstances, mask_id_of
from dkv.models.gemma import Gemma
from dkv.serving import memory
from dkv.serving.checked import checked
from dkv.serving.request import CANCELLED, FAILED, RUNNING, Request
from dkv.serving.sharing import Sharing, check_common

# Batches of other settings that are kept without a request, for the next ones like theirs.
MOST_IDLE = 4


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
            max_slots = memory.slots_that_fit(model, self.max_length, self.config.kv_cache_dtype)
        whole("max_slots", max_slots, 1)
        self.rows = max_slots // self.max_length
        if not self.rows:
            raise ValueError(
                f"max_slots ({max_slots}) must be at least max_length ({self.max_length}), the slots of one row: give "
                "a smaller max_length, or a larger max_slots"
            )
        grows = model.spec.attention != "full"
        self._cache = KVCache(self.rows, self.max_length, grows, self.config.kv_cache_dtype)
        self._free = deque(range(self.rows))
        self._waiting: deque[Request] = deque()
        self._batches: dict[str, Sharing] = {}
        self._count = 0

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a row."""
        return self.rows - len(self._free)

    def work(self, config: DiffusionConfig) -> list[Stats]:
        """What the passes of each set of settings that is kept have cost; tokens and seconds are those of requests.

        Args:
            config: with the settings to be told.
        """
        batches = [sharing.batch for sharing in self._batches.values()]
        return [replace(batch.stats, settings=circumstances(batch, config)) for batch in batches]

    @torch.no_grad()
    def add(
        self,
        input_ids: Tensor | Sequence[int] | Mapping,
        *,
        generation_config: DiffusionConfig | None = None,
        logits_processor: Any = None,
        infill: bool = False,
        logprobs: bool = False,
        **settings: Any,
    ) -> Request:
        """Ask for an answer; it is worked on by `step`.

        Args:
            input_ids: the prompt, [P] or [1, P], a list of ids, or the encoding of a tokenizer.
            generation_config: settings; default: those of the `LLM`.
            logits_processor: as for `dkv.generate`. The request then has passes of its own.
            infill: fill every mask of a text, as `dkv.infill` does, in place of continuing a prompt.
            logprobs: keep how likely every token was in the pass that filled its slot, as `Request.logprobs`. Such
                requests have passes of their own, which are not replayed.
            settings: that replace those of the configuration. Seeds that are not given are drawn.

        Raises:
            Full: `max_waiting` requests wait already.
            TypeError, ValueError, IndexError: the input or a setting is impossible, or it needs more slots than a row
                has.
        """
        if self.max_waiting is not None and self.waiting - len(self._free) >= self.max_waiting:
            raise Full(f"{self.waiting} requests wait already, and max_waiting is {self.max_waiting}: ask again later")
        how = {"infill": infill, "logprobs": logprobs}
        request = self._request(input_ids, generation_config, logits_processor, settings, **how)
        self._waiting.append(request)
        return request

    def _request(
        self, input_ids: Any, given: DiffusionConfig | None, processor: Any, settings: dict, **how: bool
    ) -> Request:
        """A request that can be, which does not wait yet."""
        config = (infill_config if how.get("infill") else config_of)(given or self.config, settings)
        if config.kv_cache_dtype != self._cache.dtype:
            raise ValueError(
                f"kv_cache_dtype must be {self._cache.dtype!r}, that of the buffer which requests share, got "
                f"{config.kv_cache_dtype!r}: make the LLM with it"
            )
        request = checked(self._count, self.model, input_ids, config, processor, self.max_length, **how)
        self._count += 1
        return request

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Give free rows to those that wait, and take a step with all that have one; returns those that ended."""
        ended = self._start()
        for sharing in self._batches.values():
            if sharing.running:
                ended += sharing.step()
        self._forget()
        return ended

    def _start(self) -> list[Request]:
        """Give free rows to those that wait, first come first served; returns those that failed."""
        starting: dict[str, list[Request]] = {}
        for _ in range(min(len(self._free), self.waiting)):
            request = self._waiting.popleft()
            starting.setdefault(request.key, []).append(request)
        return [failed for key, requests in starting.items() for failed in self._joined(key, requests)]

    def _joined(self, key: str, requests: list[Request]) -> list[Request]:
        """Let requests of the same settings share passes; returns those that failed."""
        if key not in self._batches:
            # With guidance a row has keys and values in two branches.
            cache = None if requests[0].config.cfg_scale else self._cache
            error = None
            try:
                self._batches[key] = Sharing(self.model, self.rows, self.max_length, requests[0], cache, self._free)
            except Exception as raised:
                error = raised
            check_common(self.model, error)
            if error is not None:
                # As of a device without memory for the state of other settings: those that run go on.
                for request in requests:
                    request.end(FAILED, error=error)
                return requests
        return self._batches[key].start(requests)

    def cancel(self, request: Request) -> None:
        """Let a request go; nothing happens to one that is done."""
        if request in self._waiting:
            self._waiting.remove(request)
            request.end(CANCELLED)
        elif request.state == RUNNING:
            self._batches[request.key].end(request, CANCELLED, tokens=self.draft(request))

    def close(self) -> None:
        """Say that nothing more will be asked; only other processes, where there are some, have to know."""

    def draft(self, request: Request) -> Tensor:
        """`drafts` of one request."""
        return self.drafts([request])[0]

    def drafts(self, requests: Sequence[Request]) -> list[Tensor]:
        """int64 [new] each on the CPU: what stands on the canvases now, the mask id where there is no token yet.

        Of those that run the tokens are read from the device, once for all that share passes; `request.settled` tells
        without a read whether there are more of those that stay. Of others nothing is read.
        """
        running: dict[str, list[Request]] = {}
        for request in requests:
            if request.state == RUNNING:
                running.setdefault(request.key, []).append(request)
        found = {request: request.tokens for request in requests}
        for key, some in running.items():
            found.update(zip(some, self._batches[key].drafts(some), strict=True))
        return [self._empty(request) if found[request] is None else found[request] for request in requests]

    def _empty(self, request: Request) -> Tensor:
        """A canvas without a new token."""
        if request.gap is not None:
            return request.input_ids[0].cpu()
        return torch.full((request.new,), mask_id_of(self.model, request.config))

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

    def _forget(self) -> None:
        """Let go of batches that nobody asks, but for the last ones."""
        idle = [key for key, sharing in self._batches.items() if not sharing.running]
        for key in idle[: max(len(idle) - MOST_IDLE, 0)]:
            del self._batches[key]
