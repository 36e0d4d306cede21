"""Launches that are made ready once, as Triton looks at every argument of every launch anew."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from dkv.kernels.common.workspace import Workspace

ROCM = torch.version.hip is not None


class Scratch(NamedTuple):
    """Memory of a `Workspace` that kernels fill and read: it stands for a tensor in the arguments of a call."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def filled(x: Any, memory: Callable[[Scratch], Tensor]) -> Any:
    """x with memory for the `Scratch` in it."""
    if isinstance(x, Scratch):
        return memory(x)
    if isinstance(x, tuple):
        parts = [filled(part, memory) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


class Product(NamedTuple):
    """A product of PyTorch between two kernels: out = x @ weight[start:stop].T, in float32 without rounding before."""

    x: Tensor
    weight: Tensor
    start: int
    stop: int
    out: Tensor | Scratch

    def filled(self, memory: Callable[[Scratch], Tensor]) -> "Product":
        return self._replace(out=filled(self.out, memory))

    def run(self) -> None:
        multiply(self.x, self.weight[self.start : self.stop], self.out)


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T; the interpreter's tensors are on a CPU, where PyTorch has no such product."""
    if triton.knobs.runtime.interpret:
        torch.mm(x.float(), weight.float().T, out=out)
    else:
        torch.mm(x, weight.T, out_dtype=torch.float32, out=out)


def form(tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """All that a launch depends on in tensors: Triton compiles for the dtypes, for multiples of 16 among strides and
    addresses, and for what is None; launchers go by the shapes.
    """
    known = [x if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
    if ROCM:  # where it also compiles for memory of less than 2 GiB
        known += [x is not None and x.untyped_storage().nbytes() < 2**31 for x in tensors]
    return tuple(known)


def hooked() -> bool:
    """Whether somebody wants to be told of every launch."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Ready:
    """Kernels that start at once, with other tensors of the same form.

    Args:
        calls: `Call`s whose arguments have these tensors, in tuples too, and `Scratch`; and `Product`s.
        compiled: what Triton made of each; None of a product.
        tensors: all different objects; none is kept.
        device: number of the GPU.
    """

    def __init__(self, calls: Sequence[Any], compiled: Sequence[Any], tensors: Sequence[Tensor | None], device: int):
        self._device, self._scratch = device, []
        self._places = {id(x): place for place, x in enumerate(tensors) if x is not None}
        self._first, self._kept = len(tensors), {}
        starts = [self._start(*pair) for pair in zip(calls, compiled, strict=True)]
        # A function that is written out, as Triton writes one to take the arguments of a kernel apart.
        self._run: Callable[[int, Sequence[Any]], Any] = eval(f"lambda stream, t: ({', '.join(starts)},)", self._kept)
        del self._places

    def __call__(self, tensors: tuple[Tensor | None, ...], work: Workspace | None) -> None:
        active = driver.active
        current = active.get_current_device()
        if current != self._device:
            with torch.cuda.device(self._device):
                self(tensors, work)
            return
        if self._scratch:
            work = work or Workspace()
            tensors += tuple([work.take(*request, tensors[0].device) for request in self._scratch])
        # Asked every time: a capture has a stream of its own.
        self._run(active.get_current_stream(current), tensors)

    def _start(self, call: Any, compiled: Any) -> str:
        """The start of a kernel in Python; `CompiledKernel.run` takes the same, from all versions of Triton."""
        if isinstance(call, Product):
            x, weight, out = map(self._written, (call.x, call.weight, call.out))
            return f"{self._name(multiply)}({x}, {weight}[{call.start}:{call.stop}], {out})"
        run, *known = (self._name(x) for x in (compiled.run, compiled.function, compiled.packed_metadata))
        grid = map(str, (*call.grid, 1, 1)[:3])
        arguments = (self._written(call.arguments[name]) for name in call.kernel.arg_names)
        return f"{run}({', '.join((*grid, 'stream', *known, 'None, None, None', *arguments))})"

    def _written(self, x: Any) -> str:
        """An argument in Python: t has the tensors, and after them the scratch memory."""
        if isinstance(x, Scratch):
            if x not in self._scratch:
                self._scratch.append(x)
            return f"t[{self._first + self._scratch.index(x)}]"
        if isinstance(x, Tensor):
            return f"t[{self._places[id(x)]}]"
        if isinstance(x, tuple):
            return f"({''.join(f'{self._written(part)}, ' for part in x)})"
        return self._name(x)

    def _name(self, x: Any) -> str:
        """A name for something that is the same at every launch."""
        name = f"x{len(self._kept)}"
        self._kept[name] = x
        return name
