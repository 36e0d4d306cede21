"""What `dkv audit` compiles: launches, taken from the launchers themselves, and the types of their arguments."""

import inspect
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dkv.kernels.common.launch import Call, Chip, Launch, recording

TYPES = {
    torch.bool: "i1", torch.int32: "i32", torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float32: "fp32",
}  # fmt: skip
# The launches that are compiled are those of a chip of this many multiprocessors.
PROCESSORS = 128


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        name: unique on an architecture.
        kernel: the `@triton.jit` function.
        launch: whose warps and stages are used.
        arguments: Triton types of the arguments that are not constants, such as "*bf16", "*i64", "i32" or "fp32".
        constants: values of the constexpr arguments, None for a pointer that is left out, and integers that are 1.
        aligned: names of the arguments that are divisible by 16.
        expect: families of instructions that must be there: "tensor core", "wgmma", "async copy".
        rare: spills are allowed, as in `Call`.
        far: names of the pointers to tensors that reach over 2 GiB or more.
    """

    name: str
    kernel: Any
    launch: Launch
    arguments: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    expect: tuple[str, ...] = ()
    rare: bool = False
    far: tuple[str, ...] = ()


def meta(*size: int, dtype: torch.dtype = torch.bfloat16, apart: int | None = None) -> Tensor:
    """A tensor without memory; `apart` is the stride of its second dimension, if not a dense one."""
    x = torch.empty(size, dtype=dtype, device="meta")
    if apart is None:
        return x
    return x.as_strided(size, (apart * size[1], apart, *x.stride()[2:]))


def calls_of(arch: str, regime: Hashable, launch: Launch, run: Callable[[], Any]) -> list[Call]:
    """What a launcher starts on an architecture.

    Args:
        regime: that the launcher has to choose by itself, for the launch to be used at all.
        launch: that `run` asks for.
    """
    with recording(Chip(arch, PROCESSORS)) as made:
        run()
    if made.used != [(regime, launch)]:
        raise ValueError(f"a case of {regime} with {launch} was to be made, the launcher used {made.used}")
    return made.calls


def case(name: str, call: Call, expect: Collection[str] = ()) -> Case:
    """The compilation that a call asks for: Triton compiles anew for other types, ones, and multiples of 16."""
    parameters = inspect.signature(call.kernel.fn).parameters
    arguments, constants, aligned, far = {}, {}, [], []
    for name_, x in call.arguments.items():
        if "constexpr" in str(parameters[name_].annotation) or x is None or (isinstance(x, int) and x == 1):
            constants[name_] = x
        elif isinstance(x, Tensor):
            arguments[name_] = f"*{TYPES[x.dtype]}"
            span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            if x.storage_offset() * x.element_size() % 16 == 0:
                aligned.append(name_)
            if span * x.element_size() >= 2**31:
                far.append(name_)
        elif isinstance(x, float):
            arguments[name_] = "fp32"
        else:
            arguments[name_] = "i32" if -(2**31) <= x < 2**31 else "i64"
            if x % 16 == 0:
                aligned.append(name_)
    return Case(
        name, call.kernel, call.launch, arguments, constants, tuple(aligned), tuple(expect), call.rare, tuple(far)
    )
