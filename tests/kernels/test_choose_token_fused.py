"""choose_token_fused; and the scratch, the memory and the arguments of both choices."""

import json

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dkv.kernels import RULES, Workspace, choose_token, choose_token_fused, use_backend
from dkv.kernels.choose import torch as torch_choice
from dkv.kernels.common.backend import has_triton

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SETTINGS = [
    {},
    {"rule": "margin", "banned": (1, 30), "vocab_limit": 33},
    {"rule": "entropy", "confidence_temperature": 0.7},
    {"temperature": 0.8, "banned": [4]},
    {"temperature": 0.8, "top_k": 5, "rule": "margin"},
    {"temperature": 0.8, "top_p": 0.9, "rule": "entropy"},
]
settings = pytest.mark.parametrize("how", SETTINGS, ids=lambda how: "-".join(how) or "default")


def inputs(r: int = 7, v: int = 37, d: int = 8, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose products are exact in every dtype: multiples of 1/4 below 16."""
    return torch.randint(-2, 3, (r, d)).to(dtype), (torch.randint(-2, 3, (v, d)) / 4).to(dtype)


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@settings
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_as_choosing_from_the_logits(how, dtype, backend):
    hidden, weight = inputs(dtype=dtype)
    keys = torch.arange(7)[:, None] * 5
    same(
        choose_token_fused(hidden, weight, row_keys=keys, **how), choose_token(hidden @ weight.T, row_keys=keys, **how)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype, backend):
    hidden, weight = inputs(dtype=dtype)
    bias = (torch.randint(-8, 9, (37,)) / 4).to(dtype)
    same(choose_token_fused(hidden, weight, head_bias=bias), choose_token(hidden @ weight.T + bias))


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 301, 48), (33, 4099, 16)], ids="R{0[0]}-V{0[1]}-d{0[2]}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_confidence_of_a_rounded_product(shape, dtype, backend, assert_close):
    r, v, d = shape
    hidden, weight = torch.randn(r, d).to(dtype), (torch.randn(v, d) / 4).to(dtype)
    token, confidence = choose_token_fused(hidden, weight)
    logits = hidden.double() @ weight.double().T
    exact = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    rough_dtype = torch.float32 if dtype == torch.float64 else dtype
    rough = hidden.to(rough_dtype) @ weight.to(rough_dtype).T
    plain = rough.float().log_softmax(-1).gather(1, token[:, None])[:, 0]
    assert_close(confidence, exact, plain)
    # A token other than the best is as good within the same error.
    off = (rough - logits).abs().amax() * (1 if dtype != torch.float64 else 2**-28)
    assert (logits.amax(-1) - logits.gather(1, token[:, None])[:, 0] <= 2 * off).all()


def test_strides(restride, backend):
    hidden, weight = inputs()
    same(choose_token_fused(restride(hidden), restride(weight)), choose_token_fused(hidden, weight))


def test_a_gradient_is_refused(backend):
    hidden, weight = inputs()
    weight.requires_grad_()
    for call in (lambda: choose_token_fused(hidden, weight), lambda: choose_token(hidden @ weight.T)):
        with pytest.raises(ValueError, match=r"^choose_token(_fused)? has no gradient: call it under torch.no_grad"):
            call()
        with torch.no_grad():
            _, confidence = call()
        assert not confidence.requires_grad


# Scratch


class Poisoned(Workspace):
    """Hands out scratch full of NaN, and of an id that no vocabulary has."""

    def take(self, *args):
        scratch = super().take(*args)
        return scratch.fill_(torch.nan if scratch.is_floating_point() else -7)


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_written_before_it_is_read(how, dtype, backend):
    hidden, weight = inputs(dtype=dtype)
    same(choose_token_fused(hidden, weight, workspace=Poisoned(), **how), choose_token_fused(hidden, weight, **how))
    logits = hidden @ weight.T
    same(choose_token(logits, workspace=Poisoned(), **how), choose_token(logits, **how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_does_not_grow(dtype):
    hidden, weight = inputs(dtype=dtype)
    work = Workspace()
    held = set()
    with use_backend("torch"):
        for rows in (7, 3, 7, 1):
            choose_token_fused(hidden[:rows], weight, workspace=work)
            choose_token(hidden[:rows] @ weight.T, workspace=work, temperature=1.0)
            held.add(work.nbytes)
    assert len(held) == 1
    assert held.pop() > 0


@settings
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_few_rows_and_columns_at_a_time(how, rows, monkeypatch):
    hidden, weight = inputs()
    keys = torch.arange(7)[:, None] * 5
    with use_backend("torch"):
        whole = choose_token_fused(hidden, weight, row_keys=keys, **how)
        monkeypatch.setattr(torch_choice, "SCRATCH_BYTES", rows * 37 * 4)
        same(choose_token_fused(hidden, weight, row_keys=keys, **how), whole)
        same(choose_token(hidden @ weight.T, row_keys=keys, **how), whole)
        monkeypatch.setattr(torch_choice, "STRIP", 5)
        monkeypatch.setattr(torch_choice, "PIECE", 2)
        fused = choose_token_fused(hidden, weight, row_keys=keys, **how)
        assert torch.equal(fused[0], whole[0])
        torch.testing.assert_close(fused[1], whole[1])
        token, confidence = choose_token(hidden @ weight.T, row_keys=keys, **how)
    assert torch.equal(token, whole[0])
    torch.testing.assert_close(confidence, whole[1])  # the terms of a sum are grouped in another way


def extra_memory(call, path) -> int:
    """The most bytes that `call` held at a time, its results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    trace.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


@pytest.mark.parametrize("how", [*({"rule": rule} for rule in RULES), {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_B24_memory_over_a_large_vocabulary(how, fused, tmp_path):
    hidden, weight = inputs(64, 126464, 4)
    logits = hidden @ weight.T
    with use_backend("torch"):
        call = (lambda: choose_token_fused(hidden, weight, **how)) if fused else (lambda: choose_token(logits, **how))
        most = extra_memory(call, tmp_path / "trace.json")
    assert 0 < most < 2 * logits.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_B24_memory_does_not_grow_with_the_rows(dtype, tmp_path, monkeypatch):
    hidden, weight = inputs(200, 5000, 4, dtype)
    monkeypatch.setattr(torch_choice, "SCRATCH_BYTES", 20 * 5000 * 4)
    with use_backend("torch"):
        most = [extra_memory(lambda n=n: choose_token_fused(hidden[:n], weight), tmp_path / "t") for n in (40, 200)]
    assert most[1] < 1.1 * most[0]


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_back(how, dtype, no_readback):
    hidden, weight = inputs(dtype=dtype)
    logits, keys = hidden @ weight.T, torch.arange(7)[:, None]
    for row_keys in (None, keys):
        with use_backend("torch"), no_readback():
            choose_token(logits, row_keys=row_keys, validate=False, **how)
            choose_token_fused(hidden, weight, head_bias=weight[:, 0], row_keys=row_keys, validate=False, **how)


# Arguments


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"rule": "best"}, ValueError, r"^rule must be one of probability, margin, entropy, got 'best'"),
        ({"temperature": -0.1}, ValueError, r"^temperature must be"),
        ({"temperature": float("nan")}, ValueError, r"^temperature must be"),
        ({"confidence_temperature": 0.0}, ValueError, r"^confidence_temperature must be"),
        ({"top_k": 0}, ValueError, r"^top_k must be at least 1"),
        ({"top_p": 1.5}, ValueError, r"^top_p must be between 0 and 1"),
        ({"vocab_limit": 0}, ValueError, r"^vocab_limit must be in 1\.\.37"),
        ({"vocab_limit": 38}, ValueError, r"^vocab_limit must be in 1\.\.37"),
        ({"banned": (37,)}, IndexError, r"^banned ids must be in 0\.\.36, got 37"),
        ({"banned": (-1,)}, IndexError, r"^banned ids must be in 0\.\.36, got -1"),
        ({"banned": (0, 1, 1), "vocab_limit": 2}, ValueError, r"^banned leaves no id"),
        ({"row_keys": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, r"^row_keys must have shape \[7, any\]"),
        ({"row_keys": torch.zeros(7, 0, dtype=torch.int64)}, ValueError, r"^row_keys must have at least one column"),
        ({"row_keys": torch.zeros(7, 1)}, ValueError, r"^row_keys must be int64"),
        ({"row_keys": torch.zeros(7, 1, dtype=torch.int64, device="meta")}, ValueError, r"^row_keys is on meta but"),
    ],
)
def test_settings_are_checked(how, error, message):
    hidden, weight = inputs()
    how = {"temperature": 1.0} | how
    for call in (lambda: choose_token(hidden @ weight.T, **how), lambda: choose_token_fused(hidden, weight, **how)):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3, 4), r"^logits must have shape \[any, any\]"),
        (torch.zeros(2, 3, dtype=torch.int64), r"^logits must be float16"),
    ],
)
def test_logits_are_checked(logits, message):
    with pytest.raises(ValueError, match=message):
        choose_token(logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 8)}, r"^hidden must have shape"),
        ({"hidden": torch.zeros(7, 8, dtype=torch.int64)}, r"^hidden must be float16"),
        ({"head_weight": torch.zeros(37, 9)}, r"^head_weight must have shape \[any, 8\]"),
        ({"head_weight": torch.zeros(37, 8).half()}, r"^head_weight is torch.float16 but hidden is torch.float32"),
        ({"head_weight": torch.zeros(37, 8, device="meta")}, r"^head_weight is on meta but hidden is on cpu"),
        ({"head_bias": torch.zeros(36)}, r"^head_bias must have shape"),
        ({"head_bias": torch.zeros(37).half()}, r"^head_bias is torch.float16 but hidden is torch.float32"),
        ({"head_bias": torch.zeros(37, device="meta")}, r"^head_bias is on meta but hidden is on cpu"),
    ],
)
def test_head_is_checked(changes, message):
    args = dict(zip(("hidden", "head_weight"), inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        choose_token_fused(**args | changes)


class Layer(torch.nn.Linear):
    """A head that gives its logits three columns at a time."""

    def strips(self, hidden):
        return iter(self(hidden).split(3, 1))


@settings
@pytest.mark.parametrize("name", ["torch", "reference", "triton"])
def test_behind_a_layer_that_gives_strips(how, name):
    if name == "triton" and not has_triton():
        pytest.skip("triton is not installed")
    hidden, weight = inputs()
    layer = Layer(*reversed(weight.shape), bias=True).requires_grad_(False)
    layer.weight.copy_(weight)
    keys = torch.arange(len(hidden))[:, None]
    with use_backend(name):
        token, confidence = choose_token_fused(hidden, layer, row_keys=keys, **how)
        expected = choose_token_fused(hidden, weight, head_bias=layer.bias, row_keys=keys, **how)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(confidence, expected[1])


def test_a_layer_brings_its_own_bias_and_size():
    layer = Layer(4, 6).requires_grad_(False)
    with pytest.raises(ValueError, match="head_bias goes with a head_weight that is a tensor"):
        choose_token_fused(torch.zeros(2, 4), layer, head_bias=torch.zeros(6))
    with pytest.raises(ValueError, match=r"hidden must have shape \[2, 4\], got \[2, 3\]"):
        choose_token_fused(torch.zeros(2, 3), layer)
    with pytest.raises(ValueError, match="choose_token_fused has no gradient"):
        choose_token_fused(torch.zeros(2, 4, requires_grad=True), layer)
