"""The operations as custom ops: recorded by compilers, run by whichever backend is current, right with gradients."""

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

from dkv import kernels
from dkv.kernels import use_backend
from dkv.kernels.common.backend import interpreted

B, N, S, HQ, HKV, D, P, V = 2, 3, 7, 4, 2, 16, 9, 33
EXACT = {"rtol": 0, "atol": 0}


def numbers(*size: int) -> Tensor:
    return torch.randn(size)


def indices(high: int, *size: int) -> Tensor:
    return torch.rand(*size[:-1], high).argsort(-1)[..., : size[-1]]


def buffers() -> tuple[Tensor, Tensor]:
    return numbers(B, S, HKV, D), numbers(B, S, HKV, D)


# Every operation as a function of tensors alone, and its inputs; what it writes in place is among the outputs.
def _attend(q, k, v, ranges):
    return kernels.cached_attention(q, k, v, key_ranges=ranges, return_lse=True)


def _rope_scatter(q, k, v, cos, sin, positions, k_buf, v_buf, gain):
    out = kernels.rope_scatter_(q, k, v, cos, sin, positions, k_buf, v_buf, q_norm=(gain, 1e-6), validate=False)
    return out, k_buf, v_buf


def _choose(logits, keys):
    return kernels.choose_token(logits, temperature=0.7, row_keys=keys, banned=(1,), validate=False)


def _choose_fused(hidden, weight, bias):
    return kernels.choose_token_fused(hidden, weight, head_bias=bias, rule="entropy", vocab_limit=30, validate=False)


def _commit(canvas, token, confidence, eligible, count):
    return kernels.commit_(canvas, token, confidence, eligible, count, validate=False), canvas


FUNCTIONS = {
    "rms_norm": (
        lambda *given: kernels.rms_norm(given[0], given[2], residual=given[1]),
        lambda: (numbers(B, N, D), numbers(B, N, D), numbers(D)),
    ),
    "swiglu": (kernels.swiglu, lambda: (numbers(B, N, D),)),
    "cached_attention": (_attend, lambda: (numbers(B, N, HQ, D), *buffers(), torch.tensor([[0, S], [2, 5]]))),
    "rope_scatter_": (
        _rope_scatter,
        lambda: (
            numbers(B, N, HQ, D),
            numbers(B, N, HKV, D),
            numbers(B, N, HKV, D),
            numbers(P, D // 2),
            numbers(P, D // 2),
            indices(S, B, N),
            *buffers(),
            numbers(D),
        ),
    ),
    "choose_token": (_choose, lambda: (numbers(N, V), torch.arange(N)[:, None])),
    "choose_token_fused": (_choose_fused, lambda: (numbers(N, D), numbers(V, D), numbers(V))),
    "commit_": (
        _commit,
        lambda: (
            torch.zeros(B, S, dtype=torch.int64),
            torch.randint(V, (B, S)),
            -torch.rand(B, S),
            torch.rand(B, S) < 0.6,
            torch.tensor([1, 3]),
        ),
    ),
}


def copies(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in args)


def same(actual, expected, **tolerance) -> None:
    actual, expected = ((x,) if isinstance(x, Tensor) else x for x in (actual, expected))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance)


@pytest.fixture(params=sorted(FUNCTIONS))
def operation(request):
    function, make = FUNCTIONS[request.param]
    return function, make()


# What opcheck is given: the arguments of the op itself, with and without what is optional.
SAMPLES = {
    "cached_attention": lambda: [
        (q, k, v, *rules, 0.25, lse)
        for q, (k, v) in [(numbers(B, N, HQ, D), buffers())]
        for lse in (False, True)
        for rules in (
            [None] * 6,
            [
                torch.tensor([1, 3]),
                torch.tensor([[0, S], [2, 5]]),
                torch.rand(B, S) < 0.5,
                torch.rand(B, N, S) < 0.5,
                torch.randint(3, (B, N)),
                torch.randint(3, (B, S)),
            ],
        )
    ],
    "rope_scatter_": lambda: [
        (*FUNCTIONS["rope_scatter_"][1]()[:8], *options)
        for options in (
            [None, None, 0.0, None, 0.0],
            [indices(S, B, N), numbers(D), 1e-5, numbers(D), 1e-6],
        )
    ],
    "choose_token": lambda: [
        (numbers(N, V), rule, heat, 1.0, "exact", None, None, [1], None, torch.arange(N)[:, None] if heat else None)
        for rule in kernels.RULES
        for heat in (0.0, 0.8)
    ],
    "choose_token_fused": lambda: [
        (numbers(N, D), numbers(V, D), "margin", 0.0, 1.0, "exact", 5, 0.9, [], 20, bias, None)
        for bias in (None, numbers(V))
    ],
    "commit_": lambda: [(*FUNCTIONS["commit_"][1](), positions) for positions in (None, torch.arange(S).expand(B, S))],
}


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "triton")]


@pytest.mark.parametrize("run_by", ["torch", *OTHERS])
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name, run_by):
    """Of the kernels the tests above see what is written and what is dense."""
    if run_by == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    with use_backend(run_by):
        for args in SAMPLES[name]():
            library.opcheck(getattr(torch.ops.dkv, name).default, tuple(args))


def test_compiled_in_one_graph(operation, backend):
    function, args = operation
    expected = function(*copies(args))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    same(compiled(*copies(args)), expected, **EXACT)


def test_compiled_by_the_default_compiler():
    """Several operations with arithmetic between them, through code generation."""

    def step(q, k, v, k_buf, v_buf, cos, sin, positions, weight):
        q = kernels.rope_scatter_(q * 2, k, v, cos, sin, positions, k_buf, v_buf, validate=False)
        hidden = kernels.cached_attention(q, k_buf, v_buf).flatten(2).flatten(0, 1) + 1
        return *kernels.choose_token_fused(hidden, weight, validate=False), k_buf

    args = (
        numbers(B, N, HQ, D),
        numbers(B, N, HKV, D),
        numbers(B, N, HKV, D),
        *buffers(),
        numbers(P, D // 2),
        numbers(P, D // 2),
        indices(S, B, N),
        numbers(V, HQ * D),
    )
    expected = step(*copies(args))
    same(torch.compile(step, fullgraph=True)(*copies(args)), expected)


def test_A21_inference_mode_and_after(operation, backend):
    """Compiled and plain, with tensors made in inference mode, then the same ones under no_grad."""
    function, args = operation
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(*copies(args))
    with torch.inference_mode():
        own = copies(args)
        same(function(*copies(own)), expected, **EXACT)
        same(compiled(*copies(own)), expected, **EXACT)
    with torch.no_grad():
        same(function(*copies(own)), expected, **EXACT)
        same(compiled(*copies(own)), expected, **EXACT)


def test_fake_tensors_have_the_shapes_of_real_ones(operation, backend):
    function, args = operation
    real = function(*copies(args))
    with FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(x) for x in args))
    for x, y in zip(*((z,) if isinstance(z, Tensor) else z for z in (fake, real)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


DIFFERENTIABLE = {"cached_attention": 3, "rope_scatter_": 3}


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_those_of_the_definition(name, compiled, backend):
    function, make = FUNCTIONS[name]
    args, count = make(), DIFFERENTIABLE[name]
    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function

    def gradients(f) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in args[:count]]
        out = f(*leaves, *copies(args[count:]))
        out = out if isinstance(out, Tensor) else out[0]
        loss = (out * torch.arange(out.numel()).view_as(out)).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    found = gradients(run)
    with use_backend("reference"):
        expected = gradients(lambda *a: function(*a))
    assert found[0].abs().sum() > 0
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["choose_token", "choose_token_fused"])
def test_a_choice_has_no_gradient_and_says_so(name, backend):
    function, make = FUNCTIONS[name]
    first, *others = make()
    with pytest.raises(ValueError, match=f"^{name} has no gradient: call it under torch.no_grad"):
        function(first.requires_grad_(), *others)
    with torch.no_grad():
        assert not function(first, *others)[1].requires_grad


def test_an_op_asked_directly_never_detaches_in_silence(backend):
    out, _ = torch.ops.dkv.cached_attention(numbers(B, N, HQ, D).requires_grad_(), *buffers(), *[None] * 6, 0.25, False)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
