"""Linear layers whose weights lie in the order in which the CPU multiplies them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dkv.models.joining import parts_of

UNPACK = "call dkv.unpack(model), which gives back the plain layers (or load it with pack=False)"


class Packed(nn.Module, ABC):
    """What layers with packed weights share: they turn back into plain ones, and say where only those will do."""

    @abstractmethod
    def unpacked(self) -> nn.Module:
        """A plain layer with the weights that were packed; of several, the list of them."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Names and weights of the plain layer."""
        return self.unpacked().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"the weights of a packed model cannot be replaced: {UNPACK}")

    # torch.ao writes this attribute into every module that it is to quantise, and would find no nn.Linear here.
    @property
    def qconfig(self) -> Any:
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, _: Any) -> None:
        raise RuntimeError(f"a packed model cannot be quantised: {UNPACK}")


class PackedProduct(Packed):
    """What stands in the place of `nn.Linear`, for inference on a CPU.

    The weight is held once, in oneDNN's blocked layout, and is no parameter any more: it cannot be trained or moved.
    Copies and pickles hold it in the plain layout, and pack it again.

    Args:
        linears: the layer to stand in for, or several of the same input, whose outputs then stand side by side.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        self.in_features, self.sizes = linears[0].in_features, [x.out_features for x in linears]
        self.out_features = sum(self.sizes)
        # Weights that are no parameters.
        self.num_packed = self.in_features * self.out_features
        self.dtype = linears[0].weight.dtype
        self.bias = linears[0].bias
        if len(linears) > 1 and self.bias is not None:
            self.bias = nn.Parameter(torch.cat([x.bias for x in linears]), requires_grad=False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @property
    def packed_bytes(self) -> int:
        """Of the weight."""
        return self.num_packed * self.dtype.itemsize

    @abstractmethod
    def plain_weight(self) -> Tensor:
        """The weight [out_features, in_features] in `dtype`."""

    def unpacked(self) -> nn.Module:
        plain = list(parts_of(self.plain_weight(), self.bias, self.sizes))
        return (plain[0] if len(plain) == 1 else nn.ModuleList(plain)).train(self.training)

    def check_move(self, fn: Any) -> None:
        """Raise RuntimeError if `fn`, as `nn.Module._apply` runs it on every parameter, changes device or dtype."""
        here = torch.empty(0, dtype=self.dtype)
        there = fn(here)
        if there.device != here.device or there.dtype != here.dtype:
            kind = str(here.dtype).removeprefix("torch.")
            raise RuntimeError(
                f"this model is packed for {kind} on the CPU and cannot be moved or converted to {there.dtype} on "
                f"{there.device}: {UNPACK}, or load it with the device and dtype that it should have"
            )

    def _apply(self, fn, recurse=True):
        self.check_move(fn)
        return super()._apply(fn, recurse)


class PackedLinear(PackedProduct):
    """A product in float32 or bfloat16.

    A plain one re-orders the weight at every call, which costs most where tokens are few: just where a cache leaves
    few. SiLU, and what is added or multiplied, are applied while the output is written.

    Args:
        silu: apply SiLU to the output.
    """

    # Tokens that the blocking is chosen for; any number can be multiplied.
    TOKENS = 64

    def __init__(self, *linears: nn.Linear, silu: bool = False):
        super().__init__(*linears)
        self.silu = silu
        self._pack(linears[0].weight if len(linears) == 1 else torch.cat([x.weight for x in linears]))

    def _pack(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.TOKENS)

    def taken(self, x: Tensor) -> Tensor:
        """An input as products take it: several that have the same one make it once."""
        return x

    def forward(self, x: Tensor, *, add: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features], plus `add` or times `times` of that shape."""
        if x.requires_grad:
            raise RuntimeError(f"no gradient flows through packed weights: {UNPACK}")
        other = times if add is None else add
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if other is not None:
            kind = "mul" if add is None else "add"
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, kind)
        kind = "swish" if self.silu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, kind, [1.0] if self.silu else [], "")

    @staticmethod
    def each(parts: Sequence["PackedLinear"], x: Tensor, counts: Sequence[int]) -> Tensor:
        """x [N, inputs], so many entries for each part in turn -> [N, outputs].

        Without a call of a module for each, which costs a tenth of a small product.
        """
        if x.requires_grad:
            raise RuntimeError(f"no gradient flows through packed weights: {UNPACK}")
        product = torch.ops.mkldnn._linear_pointwise
        every = zip(parts, x.split(counts), counts, strict=True)
        return torch.cat([product(few, part.packed, None, "none", [], "") for part, few, count in every if count])

    def plain_weight(self) -> Tensor:
        return self.packed.to_dense()

    def __getstate__(self) -> dict[str, Any]:
        # The packed layout is opaque to copy and pickle.
        return {**self.__dict__, "packed": self.plain_weight()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if why_not_packed(self.dtype):
            raise RuntimeError("PyTorch cannot pack the weights of this model here: save it after dkv.unpack(model)")
        self._pack(self.packed)


class PackedGates(Packed):
    """The first two products of a gated MLP: SiLU of one, times the other."""

    def __init__(self, gate: nn.Linear, up: nn.Linear):
        super().__init__()
        self.gate_proj, self.up_proj = PackedLinear(gate, silu=True), PackedLinear(up)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(x, times=self.gate_proj(x))

    def unpacked(self) -> nn.Module:
        return nn.ModuleList([self.gate_proj.unpacked(), self.up_proj.unpacked()]).train(self.training)


def why_not_packed(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype are not packed on this CPU; None: they are, and that pays."""
    built = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    if not (torch.backends.mkldnn.is_available() and built):
        return "this build of PyTorch cannot pack weights on this CPU"
    # Of a private name, which other releases may not have.
    if dtype == torch.bfloat16 and not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "this CPU has no instructions for bfloat16"
    return None if dtype in (torch.float32, torch.bfloat16) else f"weights of {dtype} cannot be packed"
