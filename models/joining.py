"""Blocks with one product where the published models have several: fewer launches, and larger ones."""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from dkv.kernels.gate.op import SWIGLU
from dkv.models.layers import Block, Layer

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
        for name in (*self.SETTINGS, "attn_norm", "q_norm", "k_norm", "mlp_norm", "o_proj", "down_proj", "experts"):
            setattr(self, name, getattr(layer, name))
        parts = {name: [getattr(layer, part) for part in parts] for name, parts in JOINED.items()}
        # A layer with experts has no MLP.
        parts = {name: linears for name, linears in parts.items() if None not in linears}
        self.sizes = {name: [linear.out_features for linear in linears] for name, linears in parts.items()}
        self.heads = [size // self.head_dim for size in self.sizes["qkv_proj"]]
        for name, linears in parts.items():
            setattr(self, name, _joined(linears))
        self.train(layer.training)

    def _qkv(self, h: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._heads(self.qkv_proj(h)).split_with_sizes(self.heads, -2)
        # The queries of all entries cost less than a product of their own.
        return query if rows is None else query.index_select(0, rows), key, value

    def _mlp(self, h: Tensor) -> Tensor:
        return self.down_proj(SWIGLU(self.gate_up_proj(h)))

    def unpacked(self, own: bool = True) -> Layer:
        """The plain layer; its weights are copies, or else parts of the joined ones."""
        plain: dict[str, Any] = dict.fromkeys(part for parts in JOINED.values() for part in parts)
        for name, sizes in self.sizes.items():
            joined = getattr(self, name)
            # Of fewer bits, a plain layer is made of it first.
            joined = joined if type(joined) is nn.Linear else joined.unpacked()
            plain |= zip(JOINED[name], parts_of(joined.weight, joined.bias, sizes, own), strict=True)
        return Layer.of(self, **plain)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Names and weights of the plain layer, which share the memory of the joined ones."""
        return self.unpacked(own=False).state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        for name, sizes in self.sizes.items():
            for kind, held in getattr(self, name).named_parameters():
                names = [f"{prefix}{part}.{kind}" for part in JOINED[name]]
                missing += [part for part in names if part not in state_dict]
                # What is missing stays as it is.
                pairs = zip(names, held.detach().split(sizes), strict=True)
                state_dict[f"{prefix}{name}.{kind}"] = torch.cat([state_dict.pop(*pair) for pair in pairs])
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if any(name in JOINED[joined] for joined in self.__dict__.get("sizes", ())):
                text = f"{name} is joined with others: call dkv.unpack(model), or load it with pack=False"
                raise AttributeError(text) from None
            raise


def join_(model: nn.Module) -> nn.Module:
    """Join the products of every frozen layer of a model, one layer after the other; the others stay as they are."""

    def joined(_: str, module: nn.Module) -> nn.Module:
        is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
        return JoinedLayer(module) if type(module) is Layer and is_frozen else module

    return replace_(model, joined)


def replace_(model: nn.Module, by: Callable[[str, nn.Module], nn.Module], prefix: str = "") -> nn.Module:
    """Put `by(name, module)` in the place of each module of a model; where that is the module itself, of those in it.

    One is gone before the next is asked for, so that there is no second copy of the model.
    """
    for key in [key for key, _ in model.named_children()]:
        name, module = f"{prefix}{key}", getattr(model, key)
        made = by(name, module)
        if made is module:
            replace_(module, by, f"{name}.")
        else:
            setattr(model, key, made)
        del module, made
    return model


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    bias = None if linears[0].bias is None else torch.cat([x.bias for x in linears])
    return linear_of(torch.cat([x.weight for x in linears]), bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer of this very weight and bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def parts_of(weight: Tensor, bias: Tensor | None, sizes: int | list[int], own: bool = True) -> Iterator[nn.Linear]:
    """Layers that compute so many of the outputs each, made as they are asked for; where they are several and each has
    its own memory, copies.
    """
    weights = weight.split(sizes)
    for part, shift in zip(weights, repeat(None) if bias is None else bias.split(sizes), strict=False):
        copied = own and len(weights) > 1
        yield linear_of(*(x.clone() if copied and x is not None else x for x in (part, shift))).requires_grad_(
            weight.requires_grad
        )
