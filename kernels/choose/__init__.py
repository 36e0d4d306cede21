"""The choice of a token and its confidence, from logits or from hidden states."""

from dkv.kernels.choose.choice import CONFIDENCE_DTYPES, RULES, Choice
from dkv.kernels.choose.op import choose_token, choose_token_fused

__all__ = ["CONFIDENCE_DTYPES", "RULES", "Choice", "choose_token", "choose_token_fused"]
