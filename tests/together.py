"""Processes that share a model, played by threads: what they tell each other goes through memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dkv.parallel import Ranks

CPU = torch.device("cpu")


class Together(Ranks):
    """One of several threads, in the place of a process."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier):
        super().__init__(rank, len(table), CPU, store=None)
        self.table, self.barrier = table, barrier

    def all(self, value: Any) -> list[Any]:
        """What every thread gives, in their order."""
        self.table[self.rank] = value
        self.barrier.wait(60)
        found = list(self.table)
        self.barrier.wait(60)
        return found

    def sum_(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.all(x.clone())).sum(0))

    def gathered(self, x: Tensor) -> Tensor:
        return torch.stack(self.all(x.clone()))

    def first(self, x: Tensor) -> Tensor:
        return x.copy_(self.all(x.clone())[0])

    def told(self, value: Any = None) -> Any:
        return self.all(value)[0]


class Team:
    """So many threads, which may work together again and again."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count)
        table: list[Any] = [None] * count
        self.ranks = [Together(rank, table, self.barrier) for rank in range(count)]

    def __call__(self, call: Callable[[Ranks], Any]) -> list[Any]:
        """What `call` gives to each; where one fails, its error is raised and all others end."""

        def one(ranks: Ranks) -> Any:
            try:
                return call(ranks)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(one, ranks) for ranks in self.ranks]
            errors = [error for future in futures if (error := future.exception())]
        if errors:
            self.barrier.reset()
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]


def together(count: int, call: Callable[[Ranks], Any]) -> list[Any]:
    """What `call` gives to each of so many threads."""
    return Team(count)(call)
