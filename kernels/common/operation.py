"""An operation, its backends, and the choice between running it and recording it.

Plain tensors go straight to a backend. Under `torch.compile`, `torch.export` and fake tensors an
operation is recorded as one opaque node, a torch custom op; which backend runs is decided when the node runs. A
recorded operation gives dense results, as a compiler must know their strides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dkv.kernels.common import backend


@dataclass(frozen=True)
class Operation:
    """One operation. Its backends are functions of one name and one list of positional arguments.

    Attributes:
        package: the folder of `dkv.kernels` that holds its backends.
        name: of the function in each of them.
        record: the same function as a custom op, for tensors that only stand for others.
        with_gradient: the same function in PyTorch, for where a gradient is asked for: the kernels have no backward
            pass. None: there is no gradient.
    """

    package: str
    name: str
    record: Callable[..., Any]
    with_gradient: Callable[..., Any] | None

    def current(self, like: Tensor) -> Callable[..., Any]:
        """The function of the backend that runs tensors such as `like`."""
        return getattr(backend.load(self.package, backend.current(like)), self.name)

    def __call__(self, like: Tensor, *args: Any) -> Any:
        """Run or record the operation; device and dtype of `like`, its first argument, choose the backend.

        Raises:
            ValueError: a gradient is asked for from an operation that has none.
        """
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((like, args))
        ):
            if self.with_gradient is None:
                raise ValueError(f"{self.name} has no gradient: call it under torch.no_grad(), or detach its arguments")
            return self.with_gradient(like, *args)
        if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
            return self.record(like, *args)
        return self.current(like)(like, *args)
