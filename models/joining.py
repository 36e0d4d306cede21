"""Blocks with one product where the published models have several: fewer launches, and larger ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dkv.kernels.swiglu.op import SWIGLU
from dkv.models.transformer import Block, Layer

# By the joined product, those that it stands for, in their order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class JoinedLayer(Block):
    """A block with the weights of queries, keys and values in one tensor, and those of gate and up in another.

    Its state_dict has, and takes, the names and weights of the plain layer.

    Args:
        layer: to stand in for; its weights are copied, and no other layer may need them.
    """

    def __init__(self, layer: Layer):
        super().__init__()
        self.index, self.head_dim = layer.index, layer.head_dim
        for name in ("attn_norm", "q_norm", "k_norm", "mlp_norm", "o_proj", "down_proj"):
            setattr(self, name, getattr(layer, name))
        self.sizes = {name: [getattr(layer, part).out_features for part in parts] for name, parts in JOINED.items()}
        for name, parts in JOINED.items():
            setattr(self, name, _joined([getattr(layer, part) for part in parts]))
        self.train(layer.training)

    def _qkv(self, h: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = map(self._heads, self.qkv_proj(h).split_with_sizes(self.sizes["qkv_proj"], -1))
        # The queries of all entries cost less than a product of their own.
        return query if rows is None else query.index_select(0, rows), key, value

    def _mlp(self, h: Tensor) -> Tensor:
        return self.down_proj(SWIGLU(self.gate_up_proj(h)))

    def unpacked(self) -> Layer:
        """The plain layer, whose weights are parts of the joined ones."""
        layer = Layer.__new__(Layer)
        nn.Module.__init__(layer)
        layer.index, layer.head_dim = self.index, self.head_dim
        for name in ("attn_norm", "q_norm", "k_norm", "mlp_norm", "o_proj", "down_proj"):
            setattr(layer, name, getattr(self, name))
        for name, parts in JOINED.items():
            for part, linear in zip(parts, _parted(getattr(self, name), self.sizes[name]), strict=True):
                setattr(layer, part, linear)
        return layer.train(self.training)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Names and weights of the plain layer."""
        return self.unpacked().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, parts in JOINED.items():
            for kind in ("weight", "bias"):
                names = [f"{prefix}{part}.{kind}" for part in parts]
                if all(name in state_dict for name in names):
                    state_dict[f"{prefix}{name}.{kind}"] = torch.cat([state_dict.pop(name) for name in names])
        super()._load_from_state_dict(state_dict, prefix, *args)


def join_(model: nn.Module) -> nn.Module:
    """Join the products of every frozen layer of a model, one layer after the other; the others stay as they are."""
    for key, child in list(model.named_children()):
        if type(child) is Layer and not any(p.requires_grad for p in child.parameters()):
            setattr(model, key, JoinedLayer(child))
        else:
            join_(child)
    return model


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    bias = None if linears[0].bias is None else torch.cat([x.bias.detach() for x in linears])
    return _linear(torch.cat([x.weight.detach() for x in linears]), bias)


def _parted(linear: nn.Linear, sizes: Sequence[int]) -> list[nn.Linear]:
    weights, biases = linear.weight.split(sizes), [None] * len(sizes)
    if linear.bias is not None:
        biases = linear.bias.split(sizes)
    return [_linear(*pair, linear.weight.requires_grad) for pair in zip(weights, biases, strict=True)]


def _linear(weight: Tensor, bias: Tensor | None, trained: bool = False) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), trained)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), trained)
    return linear
