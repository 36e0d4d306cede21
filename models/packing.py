"""Linear layers whose weights lie in the order in which the CPU multiplies them."""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """`nn.Linear` for float32 inference on a CPU, its weight in oneDNN's blocked layout.

    A plain product re-orders the weight at every call, which costs most where rows are few: just
    where a cache leaves few. The weight is held once, in the new layout, and is no parameter any
    more: it cannot be trained, saved or moved.

    Args:
        linear: the layer to stand in for.
    """

    # Rows that the blocking is chosen for; any number can be multiplied.
    ROWS = 64

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), self.ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] float32 -> [..., out_features]."""
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        raise RuntimeError(
            "this model is packed for float32 on the CPU and cannot be moved or converted; load it with pack=False, "
            "or with the device and dtype that it should have"
        )


def can_pack() -> bool:
    """Whether this build of PyTorch packs weights (it has oneDNN, on this kind of CPU)."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def pack_(model: nn.Module) -> nn.Module:
    """Replace every `nn.Linear` of a frozen float32 model on the CPU; each weight is freed in turn.

    A weight that is also used elsewhere (a head tied to the embedding) stays as it is.

    Raises:
        ValueError: a weight is on another device, of another dtype, or trainable.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in list(model.named_modules()):
        for key, child in list(module.named_children()):
            if type(child) is not nn.Linear or id(child.weight) in embeddings:
                continue
            weight = child.weight
            if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.requires_grad:
                where = f"{name}.{key}".lstrip(".")
                found = f"{weight.dtype} on {weight.device}{' and trainable' if weight.requires_grad else ''}"
                raise ValueError(f"only frozen float32 weights on the CPU can be packed; {where} is {found}")
            setattr(module, key, PackedLinear(child))
    return model
