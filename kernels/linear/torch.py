"""Products with weights of 8 or 4 bits in PyTorch: a strip of the weight is undone, used and forgotten."""

from collections.abc import Callable

import torch
from torch import Tensor

from dkv.kernels.common import operation
from dkv.kernels.common.dtypes import wide
from dkv.kernels.linear.four import unpacked4
from dkv.kernels.linear.reference import experts_of

# Of a strip of the weight that is undone: it should stay in a cache. Not measured.
STRIP_BYTES = 16 << 20

# x [T, K], weights and scales of some outputs -> their products [T, n], in the dtype of accumulation.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def int8_linear(x, weight, scales, bias, ends):
    return _linear(x, weight, scales, bias, ends, _int8)


def int4_linear(x, weight, scales, bias, ends):
    return _linear(x, weight, scales, bias, ends, _int4)


def _int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    if x.is_cuda and x.element_size() == 2 and not torch.version.hip:
        return torch.mm(x, weight.to(x.dtype).T, out_dtype=torch.float32).mul_(scales)
    x = wide(x)
    return torch.mm(x, weight.to(x.dtype).T).mul_(scales)


def _int4(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    # Undone weights are no whole numbers: in half precision they would be rounded once more.
    x = wide(x)
    return torch.mm(x, unpacked4(weight, scales.to(x.dtype)).T)


def _linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, ends: Tensor | None, of: Product) -> Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = rows.new_empty(len(rows), weight.shape[-2])
    if ends is None:
        _multiply(rows, weight, scales, bias, of, out)
    elif operation.readable(ends):
        cuts = ends[:-1].long()
        for entries, some, *matrix in zip(rows.tensor_split(cuts), out.tensor_split(cuts), weight, scales, strict=True):
            if len(entries):
                _multiply(entries, *matrix, None, of, some)
    else:  # every expert multiplies all entries, as nothing is read back
        expert, found = experts_of(len(rows), ends)[:, None], torch.empty_like(out)
        for number, matrix in enumerate(zip(weight, scales, strict=True)):
            _multiply(rows, *matrix, None, of, found)
            torch.where(expert == number, found, out, out=out)
    return out.view(*x.shape[:-1], out.shape[-1])


def _multiply(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, of: Product, out: Tensor) -> None:
    """out [T, N] by one matrix, strip by strip of the outputs."""
    step = max(1, STRIP_BYTES // (4 * max(x.shape[1], 1)))
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        sums = of(x, weight[some], scales[some])
        out[:, some] = sums if bias is None else sums.add_(bias[some])
