"""Linear layers with weights of 8 or 4 bits beside activations of the model's dtype, for a GPU: where tokens are few, a
step takes as long as it takes to read the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dkv.kernels.common.operation import Operation
from dkv.kernels.linear.four import group_of, packed4, unpacked4
from dkv.kernels.linear.op import INT4_LINEAR, INT8_LINEAR
from dkv.models.int8 import quantised
from dkv.models.joining import join_, linear_of, replace_
from dkv.models.mixture import Bank
from dkv.models.packed import Packed
from dkv.models.packing import products


@dataclass(frozen=True)
class Bits:
    """Weights of so many bits.

    Attributes:
        rounded: weights [..., N, K] -> numbers, and float32 scales.
        undone: numbers and scales -> weights [..., N, K] in the dtype of the scales.
        product: x, numbers, scales, bias, ends -> x by the weights.
        group: by the inputs of a product, how many of them share a scale.
    """

    rounded: Callable[[Tensor], tuple[Tensor, Tensor]]
    undone: Callable[[Tensor, Tensor], Tensor]
    product: Operation
    group: Callable[[int], int]


BITS = {
    "int8": Bits(quantised, lambda numbers, scales: numbers * scales[..., None], INT8_LINEAR, lambda inputs: inputs),
    "int4": Bits(packed4, unpacked4, INT4_LINEAR, group_of),
}
# The head gives the probabilities, of which none is small enough for its error to be lost in a sum with others.
HEAD_BITS = "int8"


class WeightOnly(Packed):
    """Weights as whole numbers with scales; both are buffers, which a cast leaves as they are.

    Args:
        weight: [..., N, K].
        bits: a key of `BITS`.
    """

    def __init__(self, weight: Tensor, bits: str):
        super().__init__()
        self.bits = bits
        numbers, scales = BITS[bits].rounded(weight.detach())
        self.register_buffer("weight", numbers)
        self.register_buffer("scales", scales)
        # Goes with the model where that is cast: says of which dtype plain weights would be.
        self.register_buffer("_like", weight.new_empty(0))
        # Weights that are no parameters.
        self.num_packed = weight.numel()

    @property
    def packed_bytes(self) -> int:
        """Of the weights and their scales."""
        return self.weight.nbytes + self.scales.nbytes

    def plain_weight(self) -> Tensor:
        """The weights [..., N, K] that the numbers stand for, in the dtype that the model has now."""
        wide = torch.promote_types(self._like.dtype, torch.float32)
        return BITS[self.bits].undone(self.weight, self.scales.to(wide)).to(self._like.dtype)

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in ("weight", "scales")}
        super()._apply(fn, recurse)
        for name, held in before.items():
            if getattr(self, name).dtype != held.dtype:
                setattr(self, name, held.to(getattr(self, name).device))
        return self


class WeightOnlyLinear(WeightOnly):
    """What stands in the place of a frozen `nn.Linear`; x [..., K] -> [..., N] in the dtype of x."""

    def __init__(self, linear: nn.Linear, bits: str):
        super().__init__(linear.weight, bits)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return BITS[self.bits].product(x, self.weight, self.scales, self.bias, None)

    def unpacked(self) -> nn.Linear:
        return linear_of(self.plain_weight(), self.bias).train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class WeightOnlyBank(WeightOnly):
    """What stands in the place of a `Bank`."""

    def __init__(self, bank: Bank, bits: str):
        super().__init__(bank.weight, bits)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """As `Bank.grouped`."""
        return BITS[self.bits].product(x, self.weight, self.scales, None, ends)

    def groups(self, x: Tensor) -> bool:
        """As `Bank.groups`: everywhere."""
        return True

    def unpacked(self) -> Bank:
        return Bank.of(list(self.plain_weight())).train(self.training)


def weight_only_(model: nn.Module, bits: str, device: torch.device | None = None, keep_head: bool = False) -> nn.Module:
    """Join the products of a frozen model, and hold their weights in fewer bits.

    Args:
        bits: a key of `BITS`; the head has `HEAD_BITS`, as one that is tied to the embedding stays as it is.
        device: where the model goes; None: it stays where it is. Each product goes there once it is rounded, so that
            no device ever has to hold more than the result: a card that has room for it has none for the model before.
        keep_head: leave the head as it is.
    """
    names = set(products(join_(model))) - ({"head"} if keep_head else set())

    def rounded(name: str, module: nn.Module) -> nn.Module:
        if name not in names:
            return module
        kind = WeightOnlyBank if type(module) is Bank else WeightOnlyLinear
        return kind(module, HEAD_BITS if name == "head" else bits).train(module.training).to(device)

    return replace_(model, rounded).to(device)


def check_groups(model: nn.Module, bits: str) -> None:
    """Raise ValueError if the inputs of some product cannot be cut into groups; the model may be without storage."""
    for name, module in products(model).items():
        try:
            if name != "head":
                BITS[bits].group(module.weight.shape[-1])
        except ValueError as error:
            raise ValueError(
                f'weights="{bits}" do not go with this model ({name}: {error}): take weights="int8"'
            ) from None
