"""choose_token_fused with a head of 8 bits."""

import pytest
import torch
from torch import Tensor

from dkv.kernels import RULES, Workspace, choose_token, choose_token_fused, use_backend
from dkv.kernels.choose import torch as fallback
from dkv.kernels.common.backend import has_triton, interpreted
from tests.kernels.test_choose_token_fused import Poisoned, same

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SETTINGS = [
    {},
    {"rule": "margin", "banned": (1, 30), "vocab_limit": 33, "return_entropy": True},
    {"rule": "entropy", "confidence_temperature": 0.7},
    {"temperature": 0.8, "banned": [4]},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
    {"confidence_dtype": "model"},
]
settings = pytest.mark.parametrize("how", SETTINGS, ids=lambda how: "-".join(how) or "default")


def inputs(r: int = 7, v: int = 37, d: int = 8, dtype=torch.float32) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Hidden states, a head in 8 bits and its logits, which are exact in every dtype."""
    hidden, weight = torch.randint(-2, 3, (r, d)).to(dtype), torch.randint(-2, 3, (v, d), dtype=torch.int8)
    head = {"head_weight": weight, "head_scales": 2.0 ** torch.randint(-3, 1, (v,))}
    return hidden, head, (hidden.double() @ weight.double().T * head["head_scales"].double()).to(dtype)


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_as_choosing_from_the_logits(how, dtype, backend):
    hidden, head, logits = inputs(dtype=dtype)
    shift, keys = (torch.randint(-8, 9, (37,)) / 4).to(dtype), torch.arange(7)[:, None] * 5
    for bias, of in ((None, logits), (shift, logits + shift)):
        found = choose_token_fused(hidden, **head, head_bias=bias, row_keys=keys, workspace=Poisoned(), **how)
        for one, other in zip(found, choose_token(of, row_keys=keys, **how), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_numbers_against_float64(dtype, backend):
    hidden = torch.randn(33, 48).to(dtype)
    weight, scales = torch.randint(-127, 128, (4099, 48), dtype=torch.int8), torch.rand(4099) / 200 + 1e-4
    token, confidence = choose_token_fused(hidden, weight, head_scales=scales)
    logits = hidden.double() @ weight.double().T * scales.double()
    # PyTorch rounds logits to half precision.
    off = logits.abs().amax() * (torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps)
    assert (logits.amax(-1) - logits.gather(1, token[:, None])[:, 0] <= 2 * off).all()
    exact = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    assert ((confidence - exact).abs() <= 4 * off).all()


def test_strides(restride, backend):
    hidden, head, _ = inputs()
    apart = torch.zeros(37, 2, 11, dtype=torch.int8)[:, 1, 2:-1].copy_(head["head_weight"])
    scales = torch.stack((head["head_scales"],) * 2, -1)[:, 0]
    same(choose_token_fused(restride(hidden), apart, head_scales=scales), choose_token_fused(hidden, **head))


def test_strips_and_pieces(monkeypatch):
    hidden, head, logits = inputs()
    monkeypatch.setattr(fallback, "STRIP", 5)
    with use_backend("torch"):
        found = choose_token_fused(hidden, **head, head_bias=logits[0])
        expected = choose_token(logits + logits[0])
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.skipif(not (has_triton() and interpreted()), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [9, 200])
def test_the_kernel_multiplies_for_any_number_of_rows(rule, rows, monkeypatch):
    """Of a head of floats a library would multiply for so many, strip by strip."""
    from dkv.kernels.choose import triton
    from dkv.kernels.common.launch import Launch, trial

    monkeypatch.setattr(triton, "by_strips", None)
    hidden, head, logits = inputs(rows, 301, 70)
    with use_backend("triton"), trial(launch=Launch((64, 128, 32), 4, 2), parts=2):
        found = choose_token_fused(hidden, **head, rule=rule, temperature=0.8, workspace=Workspace())
    expected = choose_token(logits, rule=rule, temperature=0.8)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2**-18, atol=1e-12)


def test_nothing_is_read_back(no_readback):
    hidden, head, _ = inputs(dtype=torch.bfloat16)
    with use_backend("torch"), no_readback():
        choose_token_fused(hidden, **head, validate=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_scales": None}, r"^a head_weight of int8 needs head_scales, a scale for each id"),
        ({"head_scales": torch.ones(36)}, r"^head_scales must have shape \[37\], got \[36\]"),
        ({"head_scales": torch.ones(37).half()}, r"^head_scales must be float32, got float16"),
        ({"head_scales": torch.ones(37, device="meta")}, r"^head_scales is on meta but hidden is on cpu"),
        (
            {"head_weight": torch.zeros(37, 8)},
            r"^head_scales goes with a head_weight of int8.*torch.float32: leave it out",
        ),
        ({"head_weight": torch.zeros(37, 9, dtype=torch.int8)}, r"^head_weight must have shape \[any, 8\]"),
        ({"head_weight": torch.nn.Linear(8, 37)}, r"^head_scales goes with a head_weight that is a tensor"),
    ],
)
def test_arguments_are_checked(changes, message):
    hidden, head, _ = inputs()
    with pytest.raises(ValueError, match=message):
        choose_token_fused(**{"hidden": hidden} | head | changes)
