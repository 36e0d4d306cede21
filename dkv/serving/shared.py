"""An `LLM` whose model several processes share: the first one is asked, and the others do what it does.

Before every step the first one tells which requests have come and which have gone. What follows from that is the same
in all: rows are given in the order of the requests, and nothing is decided by a clock.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from dkv.engine.config import DiffusionConfig
from dkv.engine.generate import config_of
from dkv.parallel import Ranks, facts_of, ranks_of
from dkv.serving import memory
from dkv.serving.llm import LLM
from dkv.serving.request import Request


class Leading(LLM):
    """The `LLM` of the first process; arguments and methods are its own, but for logits processors.

    The others are in `follow` meanwhile.
    """

    # Called with the error that ends all of it.
    on_failed: Callable[[Exception], None] = staticmethod(lambda error: None)

    def __init__(
        self,
        model: Any,
        *,
        max_slots: int | None = None,
        max_length: int | None = None,
        generation_config: DiffusionConfig | None = None,
        max_waiting: int | None = None,
        **settings: Any,
    ):
        self._ranks: Ranks = model.ranks
        config = config_of(generation_config, settings)
        length = min(2048, model.spec.max_positions) if max_length is None else max_length
        self._ranks.told((length, config))
        self._ranks.check_same(**facts_of(model))
        fit = _slots_that_fit(model, length, config)
        how = {"max_slots": fit if max_slots is None else max_slots, "max_length": length}
        super().__init__(model, **how, generation_config=config, max_waiting=max_waiting)
        self._ranks.told(how)
        self._told: dict[Request, int] = {}
        self._gone: list[int] = []

    def add(self, input_ids: Any, *, logits_processor: Any = None, **how: Any) -> Request:
        """As `LLM.add`; ValueError: with a logits processor, which the others do not have."""
        if logits_processor is not None:
            raise ValueError("logits_processor does not go with a model that several processes share: use dkv.generate")
        return super().add(input_ids, **how)

    def step(self) -> list[Request]:
        """As `LLM.step`, in all processes; Lost: one of them has gone."""
        with self._watched():
            return self._step()

    def _step(self) -> list[Request]:
        come = [request for request in self._waiting if request not in self._told]
        self._told.update((request, request.number) for request in come)
        self._ranks.told((self._gone, [_told_of(request) for request in come]))
        self._gone = []
        ended = super().step()
        for request in ended:
            self._told.pop(request, None)
        return ended

    def cancel(self, request: Request) -> None:
        """As `LLM.cancel`."""
        if (number := self._told.pop(request, None)) is not None and not request.done:
            self._gone.append(number)
        super().cancel(request)

    def close(self) -> None:
        """Let the others go."""
        with self._watched():
            self._ranks.told()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.on_failed(error)
            raise


def llm_of(model: Any, **how: Any) -> LLM:
    """An `LLM`, of the first process where several share the model."""
    return LLM(model, **how) if ranks_of(model) is None else Leading(model, **how)


def follow(model: Any) -> None:
    """Do what the first process does with its `Leading`, until it tells None.

    Raises:
        Lost: another process has gone.
    """
    with _unstopped():
        _follow(model)


@contextmanager
def _unstopped() -> Iterator[None]:
    """Whoever stops the first process lets it answer what was asked, and that takes all."""
    before = {}
    with suppress(ValueError):  # not the main thread
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@torch.no_grad()
def _follow(model: Any) -> None:
    ranks: Ranks = model.ranks
    if (told := ranks.told()) is None:
        return
    length, config = told
    ranks.check_same(**facts_of(model))
    _slots_that_fit(model, length, config)
    llm, requests = LLM(model, **ranks.told(), generation_config=config), {}
    while (told := ranks.told()) is not None:
        gone, come = told
        for number in gone:
            llm.cancel(requests.pop(number))
        for number, ids, how in come:
            requests[number] = llm.add(ids, **how)
        ended = set(llm.step())
        requests = {number: request for number, request in requests.items() if request not in ended}


def _told_of(request: Request) -> tuple[int, list[int], dict[str, Any]]:
    """Of a request its number, its prompt, and the arguments of `LLM.add`; its settings have a seed."""
    how = {"infill": request.gap is not None, "logprobs": request.wants_logprobs}
    return request.number, request.input_ids[0].tolist(), {"generation_config": request.config, **how}


def _slots_that_fit(model: Any, length: int, config: DiffusionConfig) -> int:
    """Slots of rows of a length that fit the memory of every process."""
    fit = torch.tensor([memory.slots_that_fit(model, length, config.kv_cache_dtype)], device=model.device)
    return int(model.ranks.gathered(fit).min())
