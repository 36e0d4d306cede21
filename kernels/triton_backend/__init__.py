"""The operations as fused Triton kernels: one file per operation, with its launcher and its launch table."""

from dkv.kernels.triton_backend.attention import cached_attention
from dkv.kernels.triton_backend.choose import choose_token, choose_token_fused
from dkv.kernels.triton_backend.commit import commit_
from dkv.kernels.triton_backend.launch import INTERPRETED
from dkv.kernels.triton_backend.rope_scatter import rope_scatter_
from dkv.kernels.triton_backend.rows import gather_rows, scatter_rows_

__all__ = [
    "INTERPRETED", "cached_attention", "choose_token", "choose_token_fused", "commit_", "gather_rows",
    "rope_scatter_", "scatter_rows_",
]  # fmt: skip
