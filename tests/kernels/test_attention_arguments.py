"""The arguments of cached_attention: what is refused, and by which words."""

import pytest
import torch
from torch import Tensor

from dkv.kernels import cached_attention
from tests.kernels.test_attention import inputs


def call(**changes):
    shape = (2, 3, 5, 4, 2, 16)
    args = dict(zip(("q", "k_buf", "v_buf"), inputs(shape), strict=True)) | changes
    return cached_attention(**args)


def zeros(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(2, 3, 16)}, r"^q must have shape"),
        ({"q": zeros(2, 3, 3, 16)}, r"^q has 3 heads.* 2 heads of k_buf"),
        ({"q": zeros(2, 3, 4, 16, dtype=torch.int64)}, r"^q must be float16"),
        ({"k_buf": zeros(1, 5, 2, 16)}, r"^k_buf must have shape"),
        ({"k_buf": zeros(2, 5, 0, 16), "v_buf": zeros(2, 5, 0, 16)}, r"0 heads of k_buf"),
        ({"k_buf": zeros(2, 5, 2, 16, dtype=torch.float16)}, r"^k_buf is torch.float16 but q is torch.float32"),
        ({"v_buf": zeros(2, 4, 2, 16)}, r"^v_buf must have shape"),
        ({"v_buf": zeros(2, 5, 2, 16, dtype=torch.bfloat16)}, r"^v_buf is torch.bfloat16 but q"),
        ({"query_lengths": zeros(3, dtype=torch.int64)}, r"^query_lengths must have shape"),
        ({"query_lengths": zeros(2)}, r"^query_lengths must be int32, int64"),
        ({"key_ranges": zeros(2, dtype=torch.int64)}, r"^key_ranges must have shape"),
        ({"key_ranges": zeros(2, 2, dtype=torch.bool)}, r"^key_ranges must be int32"),
        ({"key_gaps": zeros(2, 3, dtype=torch.int64)}, r"^key_gaps must have shape \[2, 2\]"),
        ({"key_gaps": zeros(2, 2)}, r"^key_gaps must be int32, int64, got float32"),
        ({"key_mask": zeros(2, 4, dtype=torch.bool)}, r"^key_mask must have shape"),
        ({"key_mask": zeros(2, 5)}, r"^key_mask must be bool, got float32"),
        ({"mask": zeros(2, 5, dtype=torch.bool)}, r"^mask must have shape"),
        ({"mask": zeros(2, 3, 5)}, r"^mask must be bool, got float32"),
        ({"block_ids": (zeros(2, 5).int(), zeros(2, 5).int())}, r"^block_ids\[0\] must have shape"),
        ({"block_ids": (zeros(2, 3).int(), zeros(2, 3).int())}, r"^block_ids\[1\] must have shape"),
        ({"block_ids": (zeros(2, 3), zeros(2, 5).int())}, r"^block_ids\[0\] must be int32"),
        ({"block_ids": (zeros(2, 3).int(), zeros(2, 5))}, r"^block_ids\[1\] must be int32"),
    ],
)
def test_arguments_are_checked(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"k_buf": zeros(2, 5, 2, 16, device="meta")}, "k_buf"),
        ({"v_buf": zeros(2, 5, 2, 16, device="meta")}, "v_buf"),
        ({"query_lengths": zeros(2, dtype=torch.int64, device="meta")}, "query_lengths"),
        ({"key_ranges": zeros(2, 2, dtype=torch.int64, device="meta")}, "key_ranges"),
        ({"key_gaps": zeros(2, 2, dtype=torch.int64, device="meta")}, "key_gaps"),
        ({"key_mask": zeros(2, 5, dtype=torch.bool, device="meta")}, "key_mask"),
        ({"block_ids": (zeros(2, 3).int().to("meta"), zeros(2, 5).int())}, r"block_ids\[0\]"),
        ({"block_ids": (zeros(2, 3).int(), zeros(2, 5).int().to("meta"))}, r"block_ids\[1\]"),
    ],
)
def test_A14_two_devices(changes, name):
    with pytest.raises(ValueError, match=f"^{name} is on meta but q is on cpu"):
        call(**changes)
