"""Head norms, rotation and the write into the buffer, as one operation."""

from dkv.kernels.rope_scatter.op import rope_scatter_
from dkv.kernels.rope_scatter.reference import head_norm, rotate

__all__ = ["head_norm", "rope_scatter_", "rotate"]
