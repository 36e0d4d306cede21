"""What int8_linear and int4_linear refuse, before anything is computed."""

import pytest
import torch

from dkv.kernels import int4_linear, int8_linear

X, WEIGHT, SCALES = torch.zeros(3, 64), torch.zeros(5, 64, dtype=torch.int8), torch.ones(5)
FOUR = {"weight": torch.zeros(5, 32, dtype=torch.uint8), "scales": torch.ones(5, 1)}
ENDS = torch.tensor([1, 3], dtype=torch.int32)
EXPERTS = {"weight": torch.zeros(2, 5, 64, dtype=torch.int8), "scales": torch.ones(2, 5), "ends": ENDS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"^x must have a last dimension"),
        ({"x": torch.zeros(3, 64).int()}, r"^x must be float16, bfloat16, float32, float64, got int32"),
        ({"x": torch.zeros(3, 63)}, r"^weight must have shape \[5, 63\], got \[5, 64\]"),
        ({"weight": WEIGHT.float()}, r"^weight must be int8, got float32"),
        ({"weight": WEIGHT[0]}, r"^weight must have shape \[any, any\], got \[64\]"),
        ({"weight": EXPERTS["weight"]}, r"^weight must have shape \[any, any\], got \[2, 5, 64\]"),
        ({"weight": WEIGHT.to("meta")}, r"^weight is on meta but x is on cpu"),
        ({"scales": SCALES[:4]}, r"^scales must have shape \[5\], got \[4\]"),
        ({"scales": SCALES.half()}, r"^scales must be float32, got float16"),
        ({"scales": SCALES.to("meta")}, r"^scales is on meta but x is on cpu"),
        ({"bias": torch.zeros(4)}, r"^bias must have shape \[5\], got \[4\]"),
        ({"bias": torch.zeros(5).half()}, r"^bias is torch.float16 but x is torch.float32"),
        ({"bias": torch.zeros(5, device="meta")}, r"^bias is on meta but x is on cpu"),
        (EXPERTS | {"weight": WEIGHT}, r"^weight with ends must have shape \[any, any, any\], got \[5, 64\]"),
        (EXPERTS | {"weight": WEIGHT[None][:0]}, r"^weight with ends must have at least one expert"),
        (EXPERTS | {"x": torch.zeros(1, 3, 64)}, r"^x with ends must have shape \[any, any\], got \[1, 3, 64\]"),
        (EXPERTS | {"scales": SCALES}, r"^scales must have shape \[2, 5\], got \[5\]"),
        (EXPERTS | {"bias": torch.zeros(5)}, r"^bias does not go with ends: add it to the result"),
        (EXPERTS | {"ends": ENDS.long()}, r"^ends must be int32, got int64"),
        (EXPERTS | {"ends": ENDS[1:]}, r"^ends must have shape \[2\], got \[1\]"),
        (EXPERTS | {"ends": ENDS.to("meta")}, r"^ends is on meta but x is on cpu"),
        (EXPERTS | {"ends": ENDS - 1}, r"^the last of ends must be the number of entries of x, 3, got 2"),
        (EXPERTS | {"ends": ENDS * torch.tensor([4, 1]).int()}, r"^ends must be ascending.*got \[4, 3\]"),
        (EXPERTS | {"ends": ENDS * torch.tensor([-1, 1]).int()}, r"^ends must be ascending.*got \[-1, 3\]"),
    ],
    ids=str,
)
def test_eight_bits(changes, message):
    with pytest.raises(ValueError, match=message):
        int8_linear(**{"x": X, "weight": WEIGHT, "scales": SCALES} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": WEIGHT}, r"^weight must be uint8, got int8"),
        (
            {"weight": FOUR["weight"][:, :31]},
            r"two numbers to a byte, so for 64 inputs .* must be 32, got shape \[5, 31\]",
        ),
        ({"x": torch.zeros(3, 63)}, r"two numbers to a byte, so for 63 inputs .* must be 31.5, got shape \[5, 32\]"),
        (
            {"scales": torch.ones(5)},
            r"^scales must have a last dimension of 1 \(groups of 64\), 2 \(groups of 32\), got",
        ),
        ({"scales": torch.ones(())}, r"^scales must have a last dimension of 1 .*, got shape \[\]"),
        ({"scales": torch.ones(5, 4)}, r"^scales must have a last dimension of 1 .*, got shape \[5, 4\]"),
        ({"scales": torch.ones(5, 0)}, r"^scales must have a last dimension of 1 .*, got shape \[5, 0\]"),
        ({"scales": torch.ones(4, 1)}, r"^scales must have shape \[5, 1\], got \[4, 1\]"),
        ({"scales": torch.ones(5, 1).half()}, r"^scales must be float32, got float16"),
        (
            {"x": torch.zeros(3, 40), "weight": FOUR["weight"][:, :20]},
            r"no group divides 40 inputs: they must be a multiple of 32",
        ),
        ({"bias": torch.zeros(4)}, r"^bias must have shape \[5\], got \[4\]"),
        ({"ends": ENDS}, r"^weight with ends must have shape \[any, any, any\], got \[5, 32\]"),
    ],
    ids=str,
)
def test_four_bits(changes, message):
    with pytest.raises(ValueError, match=message):
        int4_linear(**{"x": X} | FOUR | changes)


@pytest.mark.parametrize("name", ["int8_linear", "int4_linear"])
def test_a_gradient_is_refused(name, backend):
    x = X.clone().requires_grad_()
    given = (WEIGHT, SCALES) if name == "int8_linear" else FOUR.values()
    operation = {"int8_linear": int8_linear, "int4_linear": int4_linear}[name]
    with pytest.raises(ValueError, match=f"^{name} has no gradient: call it under torch.no_grad"):
        operation(x, *given)
    with torch.no_grad():
        assert not operation(x, *given).requires_grad
