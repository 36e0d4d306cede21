"""The choice of a token and its confidence, from logits or from hidden states."""

from dkv.kernels.choose.choice import CONFIDENCE_DTYPES

__all__ = ["CONFIDENCE_DTYPES"]
