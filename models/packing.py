"""Layers whose weights lie in the order in which the CPU multiplies them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dkv.kernels import torch_choice
from dkv.models.transformer import Attend, Layer


class PackedLinear(nn.Module):
    """`nn.Linear` for float32 inference on a CPU, its weight in oneDNN's blocked layout.

    A plain product re-orders the weight at every call, which costs most where rows are few: just
    where a cache leaves few. The weight is held once, in the new layout, and is no parameter any
    more: it cannot be trained, saved or moved.

    Args:
        linears: the layer to stand in for, or several of the same input, whose outputs then stand
            side by side.
        silu: apply SiLU to the output, while it is written.
    """

    # Rows that the blocking is chosen for; any number can be multiplied.
    ROWS = 64

    def __init__(self, *linears: nn.Linear, silu: bool = False):
        super().__init__()
        self.in_features, self.out_features = linears[0].in_features, sum(x.out_features for x in linears)
        weight = linears[0].weight if len(linears) == 1 else torch.cat([x.weight for x in linears])
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.ROWS)
        self.bias = linears[0].bias
        if len(linears) > 1 and self.bias is not None:
            self.bias = nn.Parameter(torch.cat([x.bias for x in linears]), requires_grad=False)
        self.silu = silu

    @property
    def num_packed(self) -> int:
        """Weights that are no parameters."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor, *, add: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """x [..., in_features] float32 -> [..., out_features], plus `add` or times `times` of that shape."""
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

    def _apply(self, fn, recurse=True):
        raise RuntimeError(
            "this model is packed for float32 on the CPU and cannot be moved or converted; load it with pack=False, "
            "or with the device and dtype that it should have"
        )


class PackedHead(nn.Module):
    """`PackedLinear` over a wide vocabulary, in strips of columns that fit a cache."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts = nn.ModuleList(
            PackedLinear(_columns(linear, start, start + torch_choice.STRIP))
            for start in range(0, self.out_features, torch_choice.STRIP)
        )

    def strips(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs [..., C] strip by strip, computed as they are asked for."""
        return (part(x) for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.strips(x)), -1)


def _columns(linear: nn.Linear, start: int, stop: int) -> nn.Linear:
    """The layer that computes some of the outputs, with a part of the same weight."""
    weight, bias = linear.weight[start:stop], linear.bias
    part = nn.Linear(linear.in_features, len(weight), bias=bias is not None, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        part.bias = nn.Parameter(bias[start:stop], requires_grad=False)
    return part


class PackedLayer(nn.Module):
    """`Layer` in five products, which also apply the activation, the gate and the residuals."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.index, self.head_dim = layer.index, layer.head_dim
        self.attn_norm, self.q_norm, self.k_norm = layer.attn_norm, layer.q_norm, layer.k_norm
        self.mlp_norm = layer.mlp_norm
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)
        self.heads = [x.out_features // self.head_dim for x in projections]
        self.qkv_proj, self.o_proj = PackedLinear(*projections), PackedLinear(layer.o_proj)
        self.gate_proj, self.up_proj = PackedLinear(layer.gate_proj, silu=True), PackedLinear(layer.up_proj)
        self.down_proj = PackedLinear(layer.down_proj)

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """As `Layer.forward`; here the queries of all slots cost less than a product of their own."""
        qkv = self.qkv_proj(self.attn_norm(x))
        query, key, value = qkv.unflatten(-1, (-1, self.head_dim)).split_with_sizes(self.heads, -2)
        if rows is not None:
            x, query = x.index_select(0, rows), query.index_select(0, rows)
        x = self.o_proj(attend(self, query, key, value).flatten(-2), add=x)
        h = self.mlp_norm(x)
        return self.down_proj(self.up_proj(h, times=self.gate_proj(h)), add=x)


def can_pack() -> bool:
    """Whether this build of PyTorch packs weights (it has oneDNN, on this kind of CPU)."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def pack_(model: nn.Module) -> nn.Module:
    """Replace every layer and `nn.Linear` of a frozen float32 model on the CPU; each weight is freed in turn.

    A weight that is also used elsewhere (a head tied to the embedding) stays as it is.

    Raises:
        ValueError: a weight is on another device, of another dtype, or trainable; nothing is packed.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and id(m.weight) not in embeddings}
    for name, linear in linears.items():
        weight = linear.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.requires_grad:
            found = f"{weight.dtype} on {weight.device}{' and trainable' if weight.requires_grad else ''}"
            raise ValueError(f"only frozen float32 weights on the CPU can be packed; {name} is {found}")
    _replace(model, set(linears.values()))
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
