"""An operation, its backends, and the choice between running it and recording it.

Plain tensors go straight to a backend. Under `torch.compile`, `torch.export` and fake tensors an
operation is recorded as one opaque node, a torch custom op; which backend runs is decided when the node runs. A
recorded operation gives dense results, as a compiler must know their strides.
"""

from collections.abc import Callable, Collection
from inspect import Parameter, Signature, signature
from itertools import islice
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, library, nn

from dkv.kernels.common import backend


class Operation:
    """One operation. Its backends are functions of one name and one list of arguments.

    Args:
        definition: the function of the backend "reference". Its positional arguments are those of the custom op:
            tensors if it does not say otherwise, and a class of `dkv` stands for its fields. What only spares work is a
            keyword, and is not recorded. It gives a tensor, a tuple of a fixed number of them, or None.
        fake: gives results of the right shapes and dtypes for tensors without memory.
        mutates: names of the arguments that are written.
        gradient: whether there is one, by PyTorch: the kernels have no backward pass.
    """

    def __init__(
        self, definition: Callable[..., Any], fake: Callable[..., Any], mutates: Collection[str] = (), gradient=True
    ):
        self.package, self.name = definition.__module__.split(".")[-2], definition.__name__
        # Found now, as a compiler does not follow an import.
        self.with_gradient = getattr(backend.load(self.package, "torch"), self.name) if gradient else None
        self._groups, flat = [], []  # for each argument (class, names of its fields), or None
        form = signature(definition)
        for name, parameter in form.parameters.items():
            if parameter.kind is not Parameter.POSITIONAL_OR_KEYWORD:
                continue
            kind = Tensor if parameter.annotation is Parameter.empty else parameter.annotation
            fields = get_type_hints(kind) if getattr(kind, "__module__", "").startswith("dkv.") else {}
            self._groups.append((kind, tuple(fields)) if fields else None)
            flat += [(f"{name}_{field}", hint) for field, hint in fields.items()] or [(name, kind)]

        def run(*values: Any) -> Any:
            return _dense(self.backend(values[0])(*self._grouped(values)), values[0])

        parts = get_args(form.return_annotation)
        run.__signature__ = Signature(
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in flat],
            return_annotation=tuple[(Tensor,) * len(parts)] if parts else form.return_annotation,
        )
        self._recorded = library.custom_op(f"dkv::{self.name}", run, mutates_args=mutates)
        self._recorded.register_fake(lambda *values: _dense(fake(*self._grouped(values)), values[0]))

    def backend(self, like: Tensor) -> Callable[..., Any]:
        """The function of the backend that runs tensors such as `like`."""
        return getattr(backend.load(self.package, backend.current(like)), self.name)

    def __call__(self, *args: Any, **hints: Any) -> Any:
        """Run or record the operation; device and dtype of its first tensor choose the backend.

        Raises:
            ValueError: a gradient is asked for from an operation that has none.
        """
        like = args[0] if isinstance(args[0], Tensor) else args[0][0]
        # The way of every layer of every step.
        if type(like) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self.backend(like)(*args, **hints)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in self._flat(*args)):
            if self.with_gradient is None:
                raise ValueError(f"{self.name} has no gradient: call it under torch.no_grad(), or detach its arguments")
            return self.with_gradient(*args, **hints)
        if recorded(like):
            return self._recorded(*self._flat(*args))
        return self.backend(like)(*args, **hints)

    def _flat(self, *args: Any) -> list[Any]:
        values = []
        for x, group in zip(args, self._groups, strict=True):
            values.extend([x] if group is None else [getattr(x, name) for name in group[1]])
        return values

    def _grouped(self, values: tuple[Any, ...]) -> list[Any]:
        rest = iter(values)
        return [next(rest) if group is None else group[0](*islice(rest, len(group[1]))) for group in self._groups]


def recorded(like: Tensor) -> bool:
    """Whether an operation on `like` is recorded instead of run."""
    return torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter)


def readable(x: Tensor) -> bool:
    """Whether values such as those of `x` cost nothing to read: lengths of rows, on a CPU."""
    return x.device.type == "cpu" and not recorded(x)


def _dense(results: Any, like: Tensor) -> Any:
    """Dense results; a custom op cannot leave one out of several, and gives an empty tensor for None."""
    if results is None or isinstance(results, Tensor):
        return results if results is None else results.contiguous()
    return tuple(like.new_empty(0) if x is None else x.contiguous() for x in results)
