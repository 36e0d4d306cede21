"""Attention of the active queries over the buffer."""

from dkv.kernels.attention.op import cached_attention

__all__ = ["cached_attention"]
