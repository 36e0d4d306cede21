"""Which implementation runs an operation."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

from dkv.kernels import reference, torch_backend

BACKENDS: dict[str, ModuleType] = {"torch": torch_backend, "reference": reference}

_chosen: ContextVar[str | None] = ContextVar("dkv_backend", default=None)


def _named(name: str, source: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known are {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]


def current() -> ModuleType:
    """The backend of this thread: the one of `use_backend`, else `DKV_BACKEND`, else "torch".

    Raises:
        ValueError: `DKV_BACKEND` names no backend.
    """
    name = _chosen.get()
    if name is not None:
        return BACKENDS[name]
    return _named(os.environ.get("DKV_BACKEND", "torch"), "DKV_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the `with` block on backend `name`.

    Args:
        name: "torch" (fast, any device) or "reference" (the eager definition).

    Raises:
        ValueError: no such backend.

    Example:
        >>> with dkv.use_backend("reference"):
        ...     output = dkv.generate(model, input_ids)
    """
    _named(name, "use_backend")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
