"""What `dkv audit` compiles: a kernel, one row of its launch table, and the types of its arguments."""

from dataclasses import dataclass
from typing import Any

from dkv.kernels.triton_backend.launch import Launch


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        name: unique on an architecture.
        kernel: the `@triton.jit` function.
        row: whose warps and stages are used.
        arguments: Triton types of the arguments that are not constants, such as "*bf16", "*i64", "i32" or "fp32".
        constants: values of the constexpr arguments, and None for a pointer that is left out.
        aligned: names of the arguments that are divisible by 16, as they are in a real call.
        expect: families of instructions that must be there: "tensor core", "wgmma", "async copy".
        rare: runs through its loop only where numbers are not finite, and may be slow there: spills are allowed.
    """

    name: str
    kernel: Any
    row: Launch
    arguments: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    expect: tuple[str, ...] = ()
    rare: bool = False


def case(
    name: str,
    kernel: Any,
    row: Launch,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    loose: tuple[str, ...] = (),
    expect: tuple[str, ...] = (),
) -> Case:
    """A case; arguments not named are 32-bit integers, pointers and strides are aligned but for those in `loose`.

    Args:
        types: Triton types of the arguments that are not integers.
        constants: values of the constexpr arguments, and None for a pointer that is left out.
    """
    arguments = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
    aligned = (n for n, kind in arguments.items() if (kind[0] == "*" or n.startswith("stride_")) and n not in loose)
    return Case(name, kernel, row, arguments, constants, tuple(aligned), expect)
