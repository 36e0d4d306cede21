"""The operations as custom ops: recorded by compilers, run by whichever backend is current, right with gradients."""

import pytest
import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode

from dkv import kernels
from dkv.kernels import use_backend
from dkv.kernels.common.backend import interpreted
from tests.kernels.op_samples import SAMPLES
from tests.kernels.samples import FUNCTIONS, HKV, HQ, B, D, N, P, S, V, buffers, indices, numbers

EXACT = {"rtol": 0, "atol": 0}


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


DIFFERENTIABLE = {"cached_attention": 3, "cached_attention, packed": 3, "rope_scatter_": 3, "rope_scatter_, packed": 3}


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


@pytest.mark.parametrize("name", ["attention_mass", "choose_token", "choose_token_fused"])
def test_an_operation_without_a_gradient_says_so(name, backend):
    function, make = FUNCTIONS[name]
    first, *others = make()
    with pytest.raises(ValueError, match=f"^{name} has no gradient: call it under torch.no_grad"):
        function(first.requires_grad_(), *others)
    with torch.no_grad():
        found = function(first, *others)
        assert not (found if isinstance(found, Tensor) else found[1]).requires_grad


def test_an_op_asked_directly_never_detaches_in_silence(backend):
    q, (k, v) = numbers(B, N, HQ, D).requires_grad_(), buffers()
    out, _ = torch.ops.dkv.cached_attention(q, k, None, v, None, *[None] * 9, N, 0.25, False)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()
