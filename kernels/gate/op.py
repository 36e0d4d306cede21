"""`swiglu`: its argument, and its checks."""

from torch import Tensor

from dkv.kernels.common import checks
from dkv.kernels.common.dtypes import FLOATS
from dkv.kernels.common.operation import Operation
from dkv.kernels.gate import reference

SWIGLU = Operation(reference.swiglu, lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the first computed in float32 and cast back.

    Args:
        gate_up: [..., 2 d], float16, bfloat16, float32 or float64: gate, then up.

    Returns:
        [..., d].

    Raises:
        ValueError: the last dimension is odd, or the dtype is another.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last dimension, gate and up, got shape {list(gate_up.shape)}")
    checks.dtype("gate_up", gate_up, FLOATS)
    return SWIGLU(gate_up)
