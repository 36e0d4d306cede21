"""Models whose weights lie in the order in which the CPU multiplies them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dkv.kernels.choose import torch as torch_choice
from dkv.models.int8 import Int8Gates, Int8Linear
from dkv.models.joining import JoinedLayer, linear_of, parts_of, replace_
from dkv.models.layers import Attend, Layer
from dkv.models.mixture import Bank, Experts, Shared
from dkv.models.packed import Packed, PackedGates, PackedLinear, why_not_packed

# What stands in the place of `nn.Linear`.
Kind = type[PackedLinear] | type[Int8Linear]
# And in that of the two products whose outputs are multiplied.
GATES = {PackedLinear: PackedGates, Int8Linear: Int8Gates}


class PackedHead(Packed):
    """A layer over a wide vocabulary, in strips of columns that fit a cache."""

    def __init__(self, linear: nn.Linear, kind: Kind):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        parts = parts_of(linear.weight.detach(), linear.bias, torch_choice.STRIP)
        self.parts = nn.ModuleList(kind(part) for part in parts)

    def strips(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs [..., C] strip by strip, computed as they are asked for."""
        x = self.parts[0].taken(x)
        return (part(x) for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.strips(x)), -1)

    def unpacked(self) -> nn.Linear:
        parts = [part.unpacked() for part in self.parts]
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return linear_of(torch.cat([part.weight for part in parts]), bias).train(self.training)


class PackedBank(Packed):
    """`Bank`, each expert's weights packed by themselves."""

    def __init__(self, bank: Bank, kind: Kind):
        super().__init__()
        self.parts = nn.ModuleList(kind(linear_of(weight, None)) for weight in bank.weight)

    def groups(self, x: Tensor) -> bool:
        """As `Bank.groups`: never, as it is for CPUs."""
        return False

    def each(self, x: Tensor, counts: list[int]) -> Tensor:
        """As `Bank.each`."""
        return type(self.parts[0]).each(self.parts, x, counts)

    def unpacked(self) -> Bank:
        return Bank.of([part.unpacked().weight for part in self.parts]).train(self.training)


class PackedShared(Packed):
    """`Shared` in packed products."""

    def __init__(self, shared: Shared, kind: Kind):
        super().__init__()
        self.gates, self.down_proj = GATES[kind](shared.gate_proj, shared.up_proj), kind(shared.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gates(x))

    def unpacked(self) -> Shared:
        gate, up = self.gates.unpacked()
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": self.down_proj.unpacked()}
        return Shared.of(parts).train(self.training)


class PackedLayer(Packed):
    """`Layer` in five products, which also apply the activation, the gate and the residuals."""

    def __init__(self, layer: Layer, kind: Kind = PackedLinear):
        super().__init__()
        self.index, self.head_dim, self.clip_qkv = layer.index, layer.head_dim, layer.clip_qkv
        self.attn_norm, self.mlp_norm = layer.attn_norm, layer.mlp_norm
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        self.heads = [x.out_features // self.head_dim for x in projections]
        self.qkv_proj, self.o_proj = kind(*projections), kind(layer.o_proj)
        self.experts = None if layer.experts is None else packed_experts(layer.experts, kind)
        if self.experts is None:
            self.gates, self.down_proj = GATES[kind](layer.gate_proj, layer.up_proj), kind(layer.down_proj)

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
        return self.down_proj(self.gates(h), add=x), None

    def unpacked(self) -> Layer:
        projections = dict(zip(("q_proj", "k_proj", "v_proj"), self.qkv_proj.unpacked(), strict=True))
        gate, up = (None, None) if self.experts is not None else self.gates.unpacked()
        others: dict[str, Any] = dict.fromkeys(("down_proj", "experts"))
        others |= {name: getattr(self, name).unpacked() for name in ("o_proj", *others) if getattr(self, name, None)}
        return Layer.of(self, **projections, gate_proj=gate, up_proj=up, **others)


def packed_experts(experts: Experts, kind: Kind = PackedLinear) -> Experts:
    """The same experts, with packed weights."""
    shared = None if experts.shared is None else PackedShared(experts.shared, kind)
    return experts.of(PackedBank(experts.gate_up, kind), PackedBank(experts.down, kind), shared)


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether weights of a dtype are packed on this CPU."""
    return why_not_packed(dtype) is None


def check_packable(name: str, dtype: torch.dtype, device: torch.device, trainable: bool = False) -> None:
    """Raise ValueError if weights of this kind cannot be packed."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or trainable:
        found = f"{dtype} on {device}{' and trainable' if trainable else ''}"
        raise ValueError(f"only frozen float32 or bfloat16 weights on the CPU can be packed; {name} is {found}")
    if reason := why_not_packed(dtype):
        raise ValueError(f"{reason}: leave out pack=True")


def pack_(model: nn.Module, kind: Kind = PackedLinear, keep_head: bool = False) -> nn.Module:
    """Replace every layer and `nn.Linear` of a frozen float32 or bfloat16 model on the CPU; each weight is freed in
    turn. With `Int8Linear` the model may be of any dtype, and is of float32 afterwards.

    A weight that is also used elsewhere (a head tied to the embedding) stays as it is.

    Args:
        kind: of what stands in their place.
        keep_head: leave the head as it is.

    Raises:
        ValueError: a weight is on another device, of another dtype, or trainable; nothing is packed.
    """
    names = _checked(model, kind, keep_head)

    def packed(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, Layer):
            return PackedLayer(module, kind)
        if name not in names or type(module) is not nn.Linear:
            return module
        return PackedHead(module, kind) if module.out_features > torch_choice.STRIP else kind(module)

    replace_(model, packed)
    return model.float() if kind is Int8Linear else model


def _checked(model: nn.Module, kind: Kind, keep_head: bool) -> set[str]:
    """Names of what is packed; ValueError: some of it cannot be."""
    found = {name: module for name, module in products(model).items() if not (keep_head and name == "head")}
    for name, module in found.items():
        # Weights that are rounded may be of any dtype before.
        dtype = torch.float32 if kind is Int8Linear else module.weight.dtype
        check_packable(name, dtype, module.weight.device, module.weight.requires_grad)
    return set(found)


def int8_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a float32 model has once `Int8Linear` stands in it; it may be without storage."""
    # A byte in place of four, and a scale for every output.
    saved = sum(3 * m.weight.numel() - 4 * m.weight[..., 0].numel() for m in products(model).values())
    return 4 * sum(parameter.numel() for parameter in model.parameters()) - saved


def products(model: nn.Module) -> dict[str, nn.Linear | Bank]:
    """By name, what is packed, or held in fewer bits: no weight that is also used elsewhere."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = ((name, m) for name, m in model.named_modules() if type(m) in (nn.Linear, Bank))
    return {name: m for name, m in kinds if id(m.weight) not in embeddings}


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
    if isinstance(model, Packed):
        return model.unpacked()
    if isinstance(model, JoinedLayer):
        model = model.unpacked()
    for key in [key for key, _ in model.named_children()]:
        setattr(model, key, unpack(getattr(model, key)))
    return model
