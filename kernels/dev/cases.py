"""What `dkv audit` compiles: launches, taken from the launchers themselves, and the types of their arguments."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dkv.kernels.common.launch import Call, Chip, Launch, trial
from dkv.kernels.common.stored import SCALES, Stored

NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {dtype: name for name, dtype in NUMBERS.items()} | {torch.bool: "u1", torch.int8: "i8", torch.uint8: "u8"}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}
# The launches that are compiled are those of a chip of this many multiprocessors.
PROCESSORS = 128


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        name: unique on an architecture.
        call: the kernel, its launch, and arguments as they are at a launch; tensors need no memory.
        expect: families of instructions that must be there: "tensor core", "wgmma", "async copy".
    """

    name: str
    call: Call
    expect: tuple[str, ...] = ()


def meta(*size: int, dtype: torch.dtype | str = "bf16", apart: int | None = None) -> Tensor:
    """A tensor without memory; `apart` is the stride of its second dimension, if not a dense one."""
    x = torch.empty(size, dtype=NUMBERS.get(dtype, dtype), device="meta")
    return x if apart is None else x.as_strided(size, (apart * size[1], apart, *x.stride()[2:]))


def buffer(*size: int, dtype: str, bits: bool, apart: int | None = None) -> Stored:
    """Keys or values without memory, in this dtype or in 8 bits."""
    if not bits:
        return Stored(meta(*size, dtype=dtype, apart=apart))
    return Stored(meta(*size, dtype=torch.int8, apart=apart), meta(*size[:-1], dtype=SCALES))


def calls_of(
    arch: str, regime: Hashable, launch: Launch, function: Callable[..., Any], *args: Any, parts: int | None = None
) -> list[Call]:
    """What a launcher starts on an architecture: with `launch`, which is of use if it takes `args` for `regime`."""
    with trial(launch=launch, parts=parts, chip=Chip(arch, PROCESSORS)) as tried:
        function(*args)
    if tried.regimes != [regime]:
        raise ValueError(f"a case of {regime} was to be made, the launcher chose {tried.regimes}")
    return tried.calls


class Described(NamedTuple):
    """The arguments of a call as Triton sees them: it compiles anew for other types, ones, and multiples of 16; for
    what a kernel names in `do_not_specialize` for other types alone, unless that is in a tuple.

    `types` has "*bf16", "i32", "constexpr" or a tuple of those by name. The others go by a name and places in tuples:
    values of what is "constexpr", what is divisible by 16, and pointers to tensors that end before 2 GiB.
    """

    types: dict[str, Any]
    constants: dict[tuple, Any]
    aligned: list[tuple]
    near: list[tuple]


def described(call: Call) -> Described:
    """What `call` asks the compiler for."""
    parameters, plain = inspect.signature(call.kernel.fn).parameters, _not_specialized(call.kernel)
    known = Described({}, {}, [], [])
    for name, x in call.arguments.items():
        if name in plain and isinstance(x, int | Tensor):
            known.types[name] = _kind(x)
            continue
        fixed = name in parameters and "constexpr" in str(parameters[name].annotation)
        known.types[name] = _type(tl.constexpr(x) if fixed else x, (name,), known)
    return known


def _type(x: Any, path: tuple, known: Described) -> Any:
    if isinstance(x, tuple):
        parts = [_type(part, (*path, place), known) for place, part in enumerate(x)]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, Tensor):
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if x.storage_offset() * x.element_size() % 16 == 0:
            known.aligned.append(path)
        if span * x.element_size() < 2**31:
            known.near.append(path)
        return _kind(x)
    if isinstance(x, tl.constexpr) or x is None or (isinstance(x, int) and x == 1):
        known.constants[path] = x.value if isinstance(x, tl.constexpr) else x
        return "constexpr"
    if isinstance(x, float):
        return "fp32"
    if x % 16 == 0:
        known.aligned.append(path)
    return _kind(x)


def _kind(x: Tensor | int) -> str:
    if isinstance(x, Tensor):
        return f"*{TYPES[x.dtype]}"
    return "i32" if -(2**31) <= x < 2**31 else "i64"


def _not_specialized(kernel: Any) -> tuple[str, ...]:
    """Names that a kernel gives in `do_not_specialize`; in the interpreter it keeps them among its options."""
    options = getattr(kernel, "kwargs", None) or vars(kernel)
    return tuple(options.get("do_not_specialize") or ())
