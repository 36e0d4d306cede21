"""Layers whose weights lie in the order in which the CPU multiplies them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dkv.kernels.choose import torch as torch_choice
from dkv.models.joining import JoinedLayer, linear_of, parts_of
from dkv.models.layers import Attend, Layer
from dkv.models.mixture import Bank, Experts, Shared

UNPACK = "call dkv.unpack(model), which gives back the plain layers (or load it with pack=False)"


class Packed(nn.Module, ABC):
    """What layers with packed weights share: they turn back into plain ones, and say where only those will do."""

    @abstractmethod
    def unpacked(self) -> nn.Module:
        """A plain layer with the very weights that were packed; of several, the list of them."""

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


class PackedLinear(Packed):
    """`nn.Linear` for float32 inference on a CPU, its weight in oneDNN's blocked layout.

    A plain product re-orders the weight at every call, which costs most where tokens are few: just where a cache leaves
    few. The weight is held once, in the new layout, and is no parameter any more: it cannot be trained or moved. Copies
    and pickles hold it in the plain layout, and pack it again.

    Args:
        linears: the layer to stand in for, or several of the same input, whose outputs then stand side by side.
        silu: apply SiLU to the output, while it is written.
    """

    # Tokens that the blocking is chosen for; any number can be multiplied.
    TOKENS = 64

    def __init__(self, *linears: nn.Linear, silu: bool = False):
        super().__init__()
        self.in_features, self.sizes = linears[0].in_features, [x.out_features for x in linears]
        self.out_features, self.silu = sum(self.sizes), silu
        # Weights that are no parameters.
        self.num_packed = self.in_features * self.out_features
        self._pack(linears[0].weight if len(linears) == 1 else torch.cat([x.weight for x in linears]))
        self.bias = linears[0].bias
        if len(linears) > 1 and self.bias is not None:
            self.bias = nn.Parameter(torch.cat([x.bias for x in linears]), requires_grad=False)

    def _pack(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.TOKENS)

    def forward(self, x: Tensor, *, add: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """x [..., in_features] float32 -> [..., out_features], plus `add` or times `times` of that shape."""
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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def unpacked(self) -> nn.Module:
        plain = list(parts_of(self.packed.to_dense(), self.bias, self.sizes))
        return (plain[0] if len(plain) == 1 else nn.ModuleList(plain)).train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        # The packed layout is opaque to copy and pickle.
        return {**self.__dict__, "packed": self.packed.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not can_pack():
            raise RuntimeError("PyTorch cannot pack the weights of this model here: save it after dkv.unpack(model)")
        self._pack(self.packed)

    def check_move(self, fn: Any) -> None:
        """Raise RuntimeError if `fn`, as `nn.Module._apply` runs it on every parameter, changes device or dtype."""
        here = torch.empty(0)
        there = fn(here)
        if there.device != here.device or there.dtype != here.dtype:
            raise RuntimeError(
                f"this model is packed for float32 on the CPU and cannot be moved or converted to {there.dtype} on "
                f"{there.device}: {UNPACK}, or load it with the device and dtype that it should have"
            )

    def _apply(self, fn, recurse=True):
        self.check_move(fn)
        return super()._apply(fn, recurse)


class PackedHead(Packed):
    """`PackedLinear` over a wide vocabulary, in strips of columns that fit a cache."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        parts = parts_of(linear.weight.detach(), linear.bias, torch_choice.STRIP)
        self.parts = nn.ModuleList(PackedLinear(part) for part in parts)

    def strips(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs [..., C] strip by strip, computed as they are asked for."""
        return (part(x) for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.strips(x)), -1)

    def unpacked(self) -> nn.Linear:
        parts = [part.unpacked() for part in self.parts]
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return linear_of(torch.cat([part.weight for part in parts]), bias).train(self.training)


class PackedBank(Packed):
    """`Bank`, each expert's weights packed by themselves."""

    def __init__(self, bank: Bank):
        super().__init__()
        self.parts = nn.ModuleList(PackedLinear(linear_of(weight, None)) for weight in bank.weight)

    def each(self, x: Tensor, counts: list[int]) -> Tensor:
        """As `Bank.each`; without a call of a module for each expert, which costs a tenth of a small product."""
        if x.requires_grad:
            raise RuntimeError(f"no gradient flows through packed weights: {UNPACK}")
        product = torch.ops.mkldnn._linear_pointwise
        every = zip(self.parts, x.split(counts), counts, strict=True)
        return torch.cat([product(few, part.packed, None, "none", [], "") for part, few, count in every if count])

    def unpacked(self) -> Bank:
        return Bank.of([part.unpacked().weight for part in self.parts]).train(self.training)


class PackedShared(Packed):
    """`Shared` in three products, of which two also apply the activation and the gate."""

    def __init__(self, shared: Shared):
        super().__init__()
        self.gate_proj, self.up_proj = PackedLinear(shared.gate_proj, silu=True), PackedLinear(shared.up_proj)
        self.down_proj = PackedLinear(shared.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x, times=self.gate_proj(x)))

    def unpacked(self) -> Shared:
        return Shared.of({name: part.unpacked() for name, part in self.named_children()}).train(self.training)


class PackedLayer(Packed):
    """`Layer` in five products, which also apply the activation, the gate and the residuals."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.index, self.head_dim, self.clip_qkv = layer.index, layer.head_dim, layer.clip_qkv
        self.attn_norm, self.mlp_norm = layer.attn_norm, layer.mlp_norm
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        self.heads = [x.out_features // self.head_dim for x in projections]
        self.qkv_proj, self.o_proj = PackedLinear(*projections), PackedLinear(layer.o_proj)
        self.experts = None if layer.experts is None else packed_experts(layer.experts)
        if self.experts is None:
            self.gate_proj, self.up_proj = PackedLinear(layer.gate_proj, silu=True), PackedLinear(layer.up_proj)
            self.down_proj = PackedLinear(layer.down_proj)

    def forward(
        self, x: Tensor, delta: None, attend: Attend, rows: Tensor | None = None, every: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """As `Block.forward`, with nothing left to be added; here the queries of all slots cost less than a product of
        their own.
        """
        qkv = self.qkv_proj(self.attn_norm(x))
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv.unflatten(-1, (-1, self.head_dim)).split_with_sizes(self.heads, -2)
        if rows is not None:
            x, query = x.index_select(0, rows), query if every else query.index_select(0, rows)
        x = self.o_proj(attend(self, query, key, value).flatten(-2), add=x)
        h = self.mlp_norm(x)
        if self.experts is not None:
            return x + self.experts(h), None
        return self.down_proj(self.up_proj(h, times=self.gate_proj(h)), add=x), None

    def unpacked(self) -> Layer:
        projections = dict(zip(("q_proj", "k_proj", "v_proj"), self.qkv_proj.unpacked(), strict=True))
        others: dict[str, Any] = dict.fromkeys(("gate_proj", "up_proj", "down_proj", "experts"))
        others |= {name: getattr(self, name).unpacked() for name in ("o_proj", *others) if getattr(self, name, None)}
        return Layer.of(self, **projections, **others)


def packed_experts(experts: Experts) -> Experts:
    """The same experts, with packed weights."""
    shared = None if experts.shared is None else PackedShared(experts.shared)
    return experts.of(PackedBank(experts.gate_up), PackedBank(experts.down), shared)


def can_pack() -> bool:
    """Whether this build of PyTorch packs weights (it has oneDNN, on this kind of CPU)."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def check_packable(name: str, dtype: torch.dtype, device: torch.device, trainable: bool = False) -> None:
    """Raise ValueError if weights of this kind cannot be packed."""
    if not can_pack():
        raise ValueError("this build of PyTorch cannot pack weights on this CPU: leave out pack=True")
    if device.type != "cpu" or dtype != torch.float32 or trainable:
        found = f"{dtype} on {device}{' and trainable' if trainable else ''}"
        raise ValueError(f"only frozen float32 weights on the CPU can be packed; {name} is {found}")


def pack_(model: nn.Module) -> nn.Module:
    """Replace every layer and `nn.Linear` of a frozen float32 model on the CPU; each weight is freed in turn.

    A weight that is also used elsewhere (a head tied to the embedding) stays as it is.

    Raises:
        ValueError: a weight is on another device, of another dtype, or trainable; nothing is packed.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and id(m.weight) not in embeddings}
    banks = {name: m for name, m in model.named_modules() if type(m) is Bank}
    for name, module in {**linears, **banks}.items():
        check_packable(name, module.weight.dtype, module.weight.device, module.weight.requires_grad)
    _replace(model, set(linears.values()))
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Give a packed or joined model its plain layers back, in place: the very weights that were loaded, by their names.

    What `dkv.load` packs for a CPU (its argument `pack`) can be moved, cast, trained, quantised and saved from then on;
    other layers stay as they are. Layers are replaced one by one, so that there is no second copy of the
    model; hooks on packed layers go with them.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> model = dkv.unpack(dkv.load("tiny")).to(torch.bfloat16)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model from dkv.load, got {type(model).__name__}")
    if isinstance(model, Packed | JoinedLayer):
        return model.unpacked()
    for key, child in list(model.named_children()):
        setattr(model, key, unpack(child))
    return model


def _replace(module: nn.Module, linears: set[nn.Linear]) -> None:
    for key, child in list(module.named_children()):
        if isinstance(child, Layer):
            setattr(module, key, PackedLayer(child))
        elif child in linears:
            wide = child.out_features > torch_choice.STRIP
            setattr(module, key, PackedHead(child) if wide else PackedLinear(child))
        else:
            _replace(child, linears)
