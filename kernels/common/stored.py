"""Keys and values as a buffer holds them: as they are, or in 8 bits with a scale for each slot and head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS, wide

# The largest whole number, and a scale that is smaller than any of use and far from overflow when it divides.
MOST, LEAST = 127, 1e-30
# Of 2 bytes, and of the range of float32. Numbers are divided by the scale that is kept, so its rounding adds no error
# but that of a step that is longer by 1/256 at most; and 127 (1 + 1/256) still rounds to 127.
SCALES = torch.bfloat16


class Stored(NamedTuple):
    """Keys or values of a buffer: `numbers`, or where there are scales the products of both.

    Attributes:
        numbers: [..., H, D], of any float dtype; int8 where there are scales.
        scales: bfloat16 [..., H]; None: there are none.
    """

    numbers: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(x.nbytes for x in self if x is not None)

    def at(self, index: Any) -> "Stored":
        """Those at an index of the dimensions before H."""
        return Stored(*(x if x is None else x[index] for x in self))

    def plain(self, dtype: torch.dtype) -> Tensor:
        """What they stand for, in this dtype; without scales as they are."""
        if self.scales is None:
            return self.numbers
        return self.numbers.to(dtype).mul_(self.scales.to(dtype).unsqueeze(-1))

    def wide(self, like: Tensor) -> Tensor:
        """What they stand for, in the dtype in which sums with `like` are added up."""
        return wide(self.plain(torch.promote_types(like.dtype, torch.float32)))

    def put_(self, places: tuple[Tensor, ...], x: Tensor) -> None:
        """Keep x [..., H, D] at these places. An entry is written whole, so no error of an earlier one stays."""
        kept = Stored(x.to(self.numbers.dtype)) if self.scales is None else rounded(x)
        for mine, new in zip(self, kept, strict=True):
            if mine is not None:
                mine.index_put_(places, new)


def stored(x: Tensor | Stored) -> Stored:
    """A buffer as operations take it."""
    return x if isinstance(x, Stored) else Stored(x)


def rounded(x: Tensor) -> Stored:
    """x [..., H, D] in 8 bits: off by half a scale at most, the scale being max |x| / 127 over D, or longer by 1/256.

    What holds NaN or infinity is not finite after it, all of its D numbers or some.
    """
    exact = wide(x)
    scale = (exact.abs().amax(-1) / MOST).clamp_(min=LEAST).to(SCALES)
    return Stored((exact / scale.unsqueeze(-1)).round_().to(torch.int8), scale)


def buffer_parts(name: str, x: Stored, *sizes: int | None, like: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a buffer by name, checked: the sizes, int8 with scales, and else a float, of the dtype of `like`.

    Raises:
        ValueError: it is something else.
    """
    shape = checks.shape(name, x.numbers, *sizes)
    if x.scales is None:
        checks.dtype(name, x.numbers, FLOATS)
        if like is not None:
            checks.same_dtype(**{"q": like, name: x.numbers})
        return {name: x.numbers}
    checks.dtype(name, x.numbers, (torch.int8,))
    checks.shape(f"the scales of {name}", x.scales, *shape[:-1])
    checks.dtype(f"the scales of {name}", x.scales, (SCALES,))
    return {name: x.numbers, f"the scales of {name}": x.scales}
