"""Masked bidirectional attention over a position-indexed K/V buffer, and what goes with it.

Every operation checks its arguments, then the current backend runs it. Letters in shapes: B rows,
S slots, N active slots of a row, T of all rows, R those with an output, Hq query heads, Hkv key heads, D head size,
P positions of the rotary table, V vocabulary, d hidden size.

Checks of shapes, dtypes and devices are free. Checks of values (index ranges, NaN) read numbers
back from the device; `validate=False` leaves them out, for a caller that owns its indices.
"""

from dkv.kernels.attention.op import cached_attention
from dkv.kernels.change.op import keep_rows_, row_change
from dkv.kernels.choose.choice import RULES, Choice
from dkv.kernels.choose.op import choose_token, choose_token_fused
from dkv.kernels.commit.op import advance_, commit_
from dkv.kernels.common.backend import BACKENDS, use_backend
from dkv.kernels.common.stored import Stored, rounded
from dkv.kernels.common.workspace import Workspace
from dkv.kernels.gate.op import swiglu
from dkv.kernels.linear.four import packed4, unpacked4
from dkv.kernels.linear.op import int4_linear, int8_linear
from dkv.kernels.mass.op import attention_mass
from dkv.kernels.norm.op import rms_norm
from dkv.kernels.plan.op import pack_pass, plan_pass, with_masked_window
from dkv.kernels.rope_scatter.op import rope_scatter_
from dkv.kernels.rope_scatter.reference import head_norm, rotate

__all__ = [
    "BACKENDS",
    "RULES",
    "Choice",
    "Stored",
    "Workspace",
    "advance_",
    "attention_mass",
    "cached_attention",
    "choose_token",
    "choose_token_fused",
    "commit_",
    "head_norm",
    "int4_linear",
    "int8_linear",
    "keep_rows_",
    "pack_pass",
    "packed4",
    "plan_pass",
    "rms_norm",
    "rope_scatter_",
    "rotate",
    "rounded",
    "row_change",
    "swiglu",
    "unpacked4",
    "use_backend",
    "with_masked_window",
]
