"""`rms_norm`: its arguments, and their checks."""

from torch import Tensor

from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS
from dkv.kernels.common.operation import Operation
from dkv.kernels.norm import reference

RMS_NORM = Operation(
    reference.rms_norm,
    lambda x, gain, eps, residual: (x.new_empty(x.shape), None if residual is None else x.new_empty(x.shape)),
)


def rms_norm(
    x: Tensor, gain: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm of hidden states: computed in float32, cast back, then scaled (as LLaDA and Dream do).

    Args:
        x: [..., d], float16, bfloat16, float32 or float64 (computed in float64).
        gain: [d], dtype of x.
        eps: added to the mean of the squares.
        residual: [..., d], dtype of x, added to x before the norm; the sum is rounded to the dtype of x.

    Returns:
        The norm [..., d]; with a residual also the sum.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {list(x.shape)}")
    checks.dtype("x", x, FLOATS)
    checks.shape("gain", gain, x.shape[-1])
    checks.same_dtype(x=x, gain=gain)
    checks.same_device(x=x, gain=gain, residual=residual)
    if residual is not None:
        checks.shape("residual", residual, *x.shape)
        checks.same_dtype(x=x, residual=residual)
    normed, total = RMS_NORM(x, gain, float(eps), residual)
    return normed if residual is None else (normed, total)
