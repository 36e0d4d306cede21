"""What a command does once where `torchrun` has started several processes that share a model."""

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from dkv.common import process

T = TypeVar("T")

# The commands that such processes can run.
SHARED = ("generate", "infill", "run", "serve")


def check_command(command: str) -> None:
    """Raise ValueError if several processes were started for a command that is of one."""
    if process.several() and command not in SHARED:
        raise ValueError(f"dkv {command} is one process, not several: start it without torchrun")


def ranks_of(device: str | None = None) -> Any:
    """The processes that share the model, all of them met; None: this one is alone."""
    if not process.several():
        return None
    from dkv import parallel

    are_new = parallel.met() is None
    ranks = parallel.start(device)
    if are_new:
        ranks.check_same(command=process.name())
    return ranks


def of_first(call: Callable[[], T], device: str | None = None) -> T:
    """What `call` gives, in the first of several processes: standard input, for one, is read once."""
    ranks = ranks_of(device)
    return call() if ranks is None else ranks.from_first(call)


def follow(ranks: Any, load: Callable[[], Any]) -> bool:
    """In all processes but the first: load their part of the model, and do what the first one does with an `LLM`.

    Returns:
        Whether this was one of them; it has nothing else to do.
    """
    if ranks is None or ranks.rank == 0:
        return False
    from dkv.serving import shared

    shared.follow(load())
    return True


def let_go(ranks: Any) -> None:
    """End what the others do in `follow`; in the first process."""
    if ranks is not None:
        ranks.told()


def draw_seeds(config: Any, rows: int) -> None:
    """A new seed for every row, if none is given."""
    if config.seed is None:
        drawn = of_first(lambda: [secrets.randbits(62) for _ in range(rows)])
        config.update(seed=drawn if rows > 1 else drawn[0])
