"""Linear layers with weights of 8 bits, for a CPU that multiplies bytes (VNNI)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dkv.models.packed import UNPACK, Packed, PackedProduct

# The largest number of a weight or an activation; zero is this number of the bytes that a CPU multiplies.
MOST, ZERO = 127, 128
# The same as PyTorch's arithmetic takes them, which otherwise makes such tensors at every call.
_MOST, _ZERO = torch.tensor(float(MOST), device="cpu"), torch.tensor(ZERO, dtype=torch.uint8, device="cpu")
# Smaller than any activation or weight of use, and far from overflow when it divides.
LEAST = 1e-30


class Rounded(NamedTuple):
    """Activations as bytes: x is about (number - `ZERO`) times `scale`.

    Attributes:
        numbers: uint8 [..., n].
        scale: float32 [..., 1], by token: one that others stand beside is rounded as it is alone.
    """

    numbers: Tensor
    scale: Tensor


def rounded(x: Tensor) -> Rounded:
    """Activations float32 [..., n], rounded to the nearest of 255 numbers, by token."""
    # Its memory is taken once more, as new memory costs more than the arithmetic.
    size = x.abs()
    scale = size.amax(-1, keepdim=True).clamp_min_(LEAST).div_(_MOST)
    # A cast to int8 is several times as fast as one to uint8, and a byte that overflows begins anew.
    numbers = torch.div(x, scale, out=size).round_().to(torch.int8).view(torch.uint8).add_(_ZERO)
    return Rounded(numbers, scale)


class Int8Linear(PackedProduct):
    """A product of weights of 8 bits, with a scale for each output, and activations that are rounded when it is called.

    Bytes are multiplied and added up exactly, so what a token gets does not depend on how many there are. It is off
    the product of what was not rounded by no more than s * sum |w| + t * sum |x| + in_features * s * t, where
    s = max |x| / 254 of the token and t = max |w| / 254 of the output, beside the rounding of float32. Where x, or the
    weights of an output, hold NaN or infinity, so does what is computed of them.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__(*linears)
        self.dtype = torch.float32
        weights = [quantised(linear.weight.detach()) for linear in linears]
        self.scales = torch.cat([scales for _, scales in weights])
        self._pack(torch.cat([weight for weight, _ in weights]))

    def _pack(self, weight: Tensor) -> None:
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int64)

    @property
    def packed_bytes(self) -> int:
        return self.num_packed + self.scales.nbytes

    def taken(self, x: Tensor) -> Rounded:
        """An input as products take it: several that have the same one round it once."""
        if x.requires_grad:
            raise RuntimeError(f"no gradient flows through packed weights: {UNPACK}")
        return rounded(x)

    def forward(self, x: Tensor | Rounded, *, add: Tensor | None = None) -> Tensor:
        """x [..., in_features] float32 -> [..., out_features], plus `add` of that shape."""
        x = x if isinstance(x, Rounded) else self.taken(x)
        out = self.product(x.numbers)
        if self.bias is not None:
            out = torch.addcmul(self.bias, out, x.scale, out=out)
            return out if add is None else out.add_(add)
        return out.mul_(x.scale) if add is None else torch.addcmul(add, out, x.scale, out=out)

    def product(self, numbers: Tensor, scales: Tensor | None = None) -> Tensor:
        """Without the scale of the tokens and the bias; the scales of the outputs may be others."""
        if numbers.numel() == 0:
            return torch.zeros(*numbers.shape[:-1], self.out_features)
        of = (self.packed, self.scales if scales is None else scales, self._zeros, None)
        return torch.ops.onednn.qlinear_pointwise(numbers, 1.0, ZERO, *of, 1.0, 0, torch.float32, "none", [], "")

    @staticmethod
    def each(parts: Sequence["Int8Linear"], x: Tensor, counts: Sequence[int]) -> Tensor:
        """x [N, inputs], so many entries for each part in turn -> [N, outputs]."""
        numbers, scale = parts[0].taken(x)
        every = zip(parts, numbers.split(counts), counts, strict=True)
        return torch.cat([part.product(few) for part, few, count in every if count]).mul_(scale)

    def _numbers(self) -> Tensor:
        """The weight as int8; its layout is opaque, but a product with ones gives it exactly."""
        ones = torch.eye(self.in_features, dtype=torch.uint8) + ZERO
        return self.product(ones, torch.ones(self.out_features)).to(torch.int8).T.contiguous()

    def plain_weight(self) -> Tensor:
        return self._numbers().float().mul_(self.scales[:, None])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self._numbers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if reason := why_not_int8():
            raise RuntimeError(f"int8 weights cannot be used here, as {reason}: save the model after dkv.unpack(model)")
        self._pack(self.packed)


class Int8Gates(Packed):
    """As `PackedGates`, in one product of bytes."""

    def __init__(self, gate: nn.Linear, up: nn.Linear):
        super().__init__()
        self.gate_up_proj = Int8Linear(gate, up)

    def forward(self, x: Tensor) -> Rounded:
        """x [..., in_features] -> [..., width], an input for the next product."""
        x = self.gate_up_proj.taken(x)
        if self.gate_up_proj.bias is not None:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            return rounded(nn.functional.silu(gate, inplace=True).mul_(up))
        gate, up = self.gate_up_proj.product(x.numbers).chunk(2, -1)
        # A token that is not multiplied by its scale has the same numbers.
        numbers, scale = rounded(nn.functional.silu(gate.mul_(x.scale), inplace=True).mul_(up))
        return Rounded(numbers, scale.mul_(x.scale))

    def unpacked(self) -> nn.Module:
        return self.gate_up_proj.unpacked()


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [..., outputs, inputs] as int8 numbers and float32 scales [..., outputs]: nearest of 255 by output."""
    wide = weight.float()
    scales = wide.abs().amax(-1).clamp_min_(LEAST).div_(MOST)
    return (wide / scales[..., None]).round_().to(torch.int8), scales


def why_not_int8() -> str | None:
    """Why this machine does not multiply bytes exactly; None: it does."""
    if not (hasattr(torch.ops.onednn, "qlinear_prepack") and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return "this build of PyTorch has no oneDNN"
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "this CPU has no VNNI instructions"
    return None


def check_int8(dtype: torch.dtype | str | None, pack: bool | None) -> None:
    """Raise ValueError if a CPU cannot have weights of 8 bits, or is asked to be something else, too."""
    if dtype not in (None, torch.float32):
        raise ValueError(f'weights="int8" computes in float32 beside its products: leave out dtype, got {dtype}')
    if pack is False:
        raise ValueError('weights="int8" are packed: leave out pack=False')
    if reason := why_not_int8():
        raise ValueError(f'weights="int8" cannot be used here, as {reason}: leave it out')
