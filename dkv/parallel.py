"""Several processes that share one model, each with a part of its weights: who they are, and what they tell each other.

Every process takes every step of a generation. What each knows in part, sums over features and states of a choice, is
put together in the order of the processes, so that all have the same bits, and take the same decision.
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dkv.common import process

T = TypeVar("T")

# What torchrun tells each process that it starts.
NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT")
NEEDED = (*NUMBERS, "MASTER_ADDR")
HOW = "torchrun --nproc-per-node 2 -m dkv generate ..."
# Where the first process that fails leaves its last word.
FAILED = "failed"
# How many others have read it, and that the first process has said it; for how many seconds that is waited for.
HEARD, SAID, LINGER = "heard", "said", 3
# A server may have nothing to do for long. That a process has gone is told by its connection, not by the clock.
PATIENCE = timedelta(days=365)
# For the others to come; and for a message from where last words are kept.
MEETING, STORE_PATIENCE = timedelta(minutes=5), timedelta(seconds=5)


class Lost(ConnectionError):
    """Another process has gone; `word` is what it left, None where it left nothing."""

    def __init__(self, text: str, word: str | None):
        super().__init__(text)
        self.word = word


class Ranks:
    """The processes that share a model, as one of them sees it.

    Attributes:
        rank, size: the number of this process, from 0 on, and how many there are.
        device: where its part of the model goes.
    """

    def __init__(self, rank: int, size: int, device: torch.device, store: Any):
        self.rank, self.size, self.device, self._store = rank, size, device, store

    @property
    def is_ours(self) -> bool:
        """Whether `start` made the group."""
        return self._store is not None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.fail(process.in_one_line(error))
        end()

    def share(self, size: int, what: str = "features") -> slice:
        """Which of `size` things are this process's: runs as even as can be, in the order of the processes.

        Raises:
            ValueError: there are fewer than processes.
        """
        if size < self.size:
            raise ValueError(f"{size} {what} cannot be split over {self.size} processes: start fewer")
        return slice(size * self.rank // self.size, size * (self.rank + 1) // self.size)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of what all processes have, in place of x; every number is added up once, and told to all."""
        if not x.numel():
            return x
        with self._together():
            dist.all_reduce(x)
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """What all processes have, [size, *x.shape], in their order; shapes and dtypes are the same in all."""
        x = x.contiguous()
        found = x.new_empty(self.size, *x.shape)
        with self._together():
            dist.all_gather(list(found.unbind(0)), x)
        return found

    def first(self, x: Tensor) -> Tensor:
        """What process 0 has, in place of x."""
        x = x.contiguous()
        with self._together():
            dist.broadcast(x, 0)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean of what all processes have, by the same sums in all of them."""
        return self.gathered(x).mean(0)

    def from_first(self, call: Callable[[], T]) -> T:
        """What `call` gives in process 0, in all of them: what is read once, or drawn by chance."""
        return self.told(call() if self.rank == 0 else None)

    def told(self, value: Any = None) -> Any:
        """A Python object of process 0; what the others give is not looked at."""
        box = [value]
        with self._together():
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def same(self, *values: Any) -> list[bool]:
        """Which of these values all processes have alike: tensors, numbers, texts, settings."""
        digests = [hashlib.sha256(repr(_plain(value)).encode()).digest()[:7] for value in values]
        found = self.gathered(torch.tensor([int.from_bytes(d, "big") for d in digests], device=self.device))
        return (found == found[0]).all(0).tolist()

    def check_same(self, **values: Any) -> None:
        """Raise ValueError in all processes, with the names of what differs, if they were given different things."""
        same = self.same(*values.values())
        if differ := [name for name, alike in zip(values, same, strict=True) if not alike]:
            raise ValueError(f"{', '.join(differ)}: the processes were given different ones: give all of them the same")

    def fail(self, line: str) -> str | None:
        """Leave a last word; the line if this process is to say it, None: the first one does, or another has failed."""
        with suppress(Exception):
            mine = f"{self.rank} {line}"
            is_first_word = self._store.compare_set(FAILED, "", mine).decode() == mine
            if self.rank:
                return line if is_first_word and not self._linger(lambda: self._store.check([SAID])) else None
            self._store.set(SAID, "")
            # Where this process keeps the last words itself, the others read them from it.
            if is_first_word and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._linger(lambda: self._store.add(HEARD, 0) == self.size - 1)
        return line

    def _linger(self, until: Callable[[], bool]) -> bool:
        """Wait, though not long, for what others do when they notice that this process has gone; whether they did."""
        if self.device.type != "cpu":
            # NCCL may wait for all to part.
            return False
        with suppress(ValueError):  # not the main thread
            # torchrun ends all others as soon as one is gone.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()
        end = time.monotonic() + LINGER
        # The process that keeps the words may have gone by now, which is when they are said.
        with suppress(RuntimeError):
            while not until():
                if time.monotonic() > end:
                    return False
                time.sleep(0.01)
        return True

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> Lost:
        with suppress(Exception):
            if self._store.check([FAILED]):
                who, _, word = self._store.get(FAILED).decode().partition(" ")
                self._store.add(HEARD, 1)
                said = word.removeprefix(f"{process.name()}: error: ")
                return Lost(f"process {who} of {self.size} has failed: {said}", word)
        others = f"another of the {self.size} processes has" if self.size > 2 else f"process {1 - self.rank} of 2 has"
        return Lost(f"{others} ended without a word: it was killed, or its machine is gone", None)

    def last_word(self, error: BaseException, line: str) -> str | None:
        """What this process says of the error that ends it, `line` by itself; None: another process says it."""
        if self.rank and isinstance(error, Lost) and error.word is not None:
            return None
        return self.fail(line)


def _plain(value: Any) -> Any:
    """A value without tensors."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, Tensor) else value


_ranks: Ranks | None = None


def start(device: torch.device | str | None = None) -> Ranks:
    """Meet the other processes; called again, those that were met. A default group of torch that is there already is
    used, and left to who made it; processes then end without a word of the others.

    Args:
        device: "cpu", or "cuda": the card whose number is that of the process on its machine. None: "cuda" where there
            is one.

    Raises:
        ValueError: the process is not one of several (`torchrun` starts them), or has no card to itself.
        Lost: the others cannot be reached, or do not come.

    Example:
        >>> with dkv.parallel.start() as ranks:
        ...     model = dkv.load("GSAI-ML/LLaDA-8B-Instruct", ranks=ranks)
    """
    global _ranks
    if _ranks is not None:
        return _ranks
    if dist.is_initialized():
        _ranks = Ranks(dist.get_rank(), dist.get_world_size(), _device(device), store=None)
        return _ranks
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ValueError(f"this is not one of several processes ({missing[0]} is not set): start them by {HOW}")
    _check_numbers()
    where = _device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # Imported later, its functions would hold on to the group, and its connections would stay when it is destroyed.
    import_module("torch.distributed.nn.functional")
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=MEETING)))
    except RuntimeError as error:
        where_to = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        raise Lost(f"the processes cannot meet at {where_to}: {str(error).splitlines()[0]}", None) from error
    _meet(store, size)
    # Objects go by gloo, whatever the tensors go by.
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    own = dist.PrefixStore("dkv", store)
    # Less patience than the group has.
    own.set_timeout(STORE_PATIENCE)
    _ranks = Ranks(rank, size, where, own)
    process.judged_by(_ranks.last_word)
    return _ranks


def _check_numbers() -> None:
    """Raise ValueError if the environment numbers this process as none of so many."""
    for name in NUMBERS:
        if not os.environ[name].isdecimal():
            raise ValueError(f"the variable {name} must be a whole number, got {os.environ[name]!r}: torchrun sets it")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise ValueError("RANK={RANK} must be below WORLD_SIZE={WORLD_SIZE}: torchrun sets them".format_map(os.environ))


def _meet(store: Any, size: int) -> None:
    """Wait for the others, with less patience than later; Lost: they do not come."""
    try:
        if store.add("dkv/here", 1) == size:
            store.set("dkv/all", "here")
        store.wait(["dkv/all"], MEETING)
    except RuntimeError as error:
        raise Lost(f"not all {size} processes have come: the messages of the others say why", None) from error


def end() -> None:
    """Part from the other processes."""
    global _ranks
    before, _ranks = _ranks, None
    if before is not None and before.is_ours and dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def met() -> Ranks | None:
    """The processes that `start` has met; None: it was not called."""
    return _ranks


def facts_of(model: Any) -> dict[str, Any]:
    """By what processes tell that they share one model: its spec, a few weights that all have, and its dtype."""
    return {"model": (model.spec, model.norm.weight[:64]), "dtype": model.dtype}


def ranks_of(model: Any) -> Ranks | None:
    """The processes that share a model; None: it is whole here."""
    return getattr(model, "ranks", None)


def _device(wanted: torch.device | str | None) -> torch.device:
    kind = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.index is not None:
        raise ValueError(f"device={str(wanted)!r} is one for all processes: give {kind.type!r}, and each takes its own")
    if kind.type == "cpu":
        return kind
    here, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if not there:
        raise ValueError(f"device={str(wanted)!r}: this machine has no GPU that PyTorch sees: give 'cpu'")
    if here >= there:
        raise ValueError(f"process {here} of this machine has no card: it has {there}; start no more processes")
    return torch.device(kind.type, here)
