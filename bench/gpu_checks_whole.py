"""All operations together: repeated bits, graphs, compilation, several devices, whole generations."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dkv
from dkv import kernels
from dkv.bench.gpu_tools import Skipped, check, check_each, close, distinct, need_gpu, randn, same
from dkv.bench.gpu_work import SHAPE_OF
from dkv.bench.shapes import random_model, shape, tiny
from dkv.kernels.common import backend


def _all_ops(device: torch.device) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A function that calls every operation without a check of values, and its inputs."""
    b, n, s, v = 2, 6, 40, 1500
    inputs = [randn(device, b, n, h, 64) for h in (4, 2, 2)] + [randn(device, s, 32) for _ in range(2)]
    inputs += [randn(device, b * n, 48), randn(device, v, 48), distinct(device, b, n, s)]
    inputs += [torch.tensor([2, 4], device=device), torch.tensor([[0, s], [0, s - 5]], device=device)]
    inputs += [torch.arange(b * n, device=device)[:, None]]

    def step(q, k, v, cos, sin, hidden, weight, places, count, ranges, keys):
        buffers = [torch.ones(b, s, 2, 64, device=q.device) for _ in range(2)]
        canvas = torch.zeros(b, s, dtype=torch.int64, device=q.device)
        query = kernels.rope_scatter_(q, k, v, cos, sin, places, *buffers, validate=False)
        out = kernels.cached_attention(query, *buffers, key_ranges=ranges)
        rows = kernels.gather_rows(buffers[0], places, validate=False)
        kernels.scatter_rows_(buffers[1], places, rows + 1, validate=False)
        how = {"temperature": 0.8, "seed": 5, "row_keys": keys, "validate": False}
        token, confidence = kernels.choose_token_fused(hidden, weight, **how)
        other, _ = kernels.choose_token(hidden @ weight.T, rule="margin", validate=False)
        done = kernels.commit_(
            canvas, token.view(b, n), confidence.view(b, n), places >= 0, count, positions=places, validate=False
        )
        return (query, *buffers, out, rows, token, confidence, other, done, canvas)

    return step, inputs


@check
def repeated_calls_give_the_same_bits(device) -> None:
    step, inputs = _all_ops(device)
    first = step(*inputs)
    for _ in range(5):
        for i, (a, b) in enumerate(zip(step(*inputs), first, strict=True)):
            same(a, b, f"result {i}")


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if old is None else os.environ.update({name: old})


@check_each("a_row_alone_and_in_a_batch_of_8", (torch.float32, torch.bfloat16))
def alone_and_in_company(device, dtype) -> None:
    """With DKV_BATCH_INVARIANT=1 a row gives the same bits alone and among 8."""
    if backend.chosen() != "triton":
        raise Skipped("the matrix products of torch depend on the batch")
    with _variable("DKV_BATCH_INVARIANT", "1"):
        for n, s in ((4, 700), (48, 300)):
            q, k, v = (randn(device, *shape, dtype=dtype) for shape in ((8, n, 4, 64), (8, s, 2, 64), (8, s, 2, 64)))
            out = kernels.cached_attention(q, k, v)
            hidden, weight = randn(device, 8 * n, 128, dtype=dtype), randn(device, 3000, 128, dtype=dtype)
            logits, keys = (hidden @ weight.T), torch.arange(8 * n, device=device)[:, None]
            how = {"temperature": 0.5, "seed": 1}
            chosen = kernels.choose_token(logits, row_keys=keys, **how)
            fused = kernels.choose_token_fused(hidden, weight, row_keys=keys, **how)
            for row in range(8):
                own, mine = slice(row, row + 1), slice(row * n, row * n + n)
                same(kernels.cached_attention(q[own], k[own], v[own]), out[own], f"attention, {n} queries")
                for i, part in enumerate(kernels.choose_token(logits[mine], row_keys=keys[mine], **how)):
                    same(part, chosen[i][mine], f"choose_token, {n} rows, result {i}")
                for i, part in enumerate(kernels.choose_token_fused(hidden[mine], weight, row_keys=keys[mine], **how)):
                    same(part, fused[i][mine], f"choose_token_fused, {n} rows, result {i}")


@check
def cuda_graph(device) -> None:
    """All operations captured once and replayed on other inputs."""
    need_gpu(device)
    step, inputs = _all_ops(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*inputs)
    for x in inputs[:3]:
        x.copy_(torch.randn_like(x))
    inputs[7].copy_(distinct(device, *inputs[7].shape, 40))
    graph.replay()
    torch.cuda.synchronize(device)
    for i, (a, b) in enumerate(zip(results, step(*inputs), strict=True)):
        same(a, b, f"replayed result {i}")


@check
def torch_compile(device) -> None:
    """One graph without breaks, equal results; tensors of inference mode too (casebook A21)."""
    step, inputs = _all_ops(device)
    expected = step(*inputs)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = compiled(*(x.clone() for x in inputs))
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            a, b = a.clone(), b.clone()
            if a.is_floating_point():
                close(a, b.double(), b * (1 + 1e-6), f"compiled result {i}, {mode.__name__}")
            else:
                same(a, b, f"compiled result {i}, {mode.__name__}")


@check
def second_device(device) -> None:
    """Casebook A14: everything on a device that is not the current one."""
    need_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two devices")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    step, inputs = _all_ops(device)
    for i, (a, b) in enumerate(zip(step(*(x.to(other) for x in inputs)), step(*inputs), strict=True)):
        assert a.device == other, f"result {i} is on {a.device}"
        same(a, b, f"result {i}")


POLICIES = (dkv.NoCache(), dkv.DecodeCache(3), dkv.GreedyCache(3, 2), dkv.PrefillCache(), dkv.PrefillDecodeCache(3))


@check_each("generation", [f"{family}_{p.name}" for family in ("llada", "dream") for p in POLICIES])
def generation(device, case) -> None:
    """A small float32 model gives the tokens of the torch backend, padded prompts and drawn tokens included."""
    family, name = case.split("_")
    policy = next(p for p in POLICIES if p.name == name)
    # Drawn on the host: the same weights on every device.
    spec = tiny(shape(SHAPE_OF[family]))
    model = random_model(spec, torch.device("cpu"), torch.float32, std=0.3).to(device)
    ids = torch.randint(model.spec.vocab_size - 1, (3, 11)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for settings in ({}, {"temperature": 0.9, "confidence": "margin"}, {"confidence": "random"}):
        call = {"max_new_tokens": 12, "block_length": 6, "cache": policy, "seed": 4, **settings}
        found = dkv.generate(model, ids, mask, **call, output_history=True)
        with kernels.use_backend("torch"):
            expected = dkv.generate(model, ids, mask, **call, output_history=True)
        same(found.history, expected.history, f"tokens by step, {settings or 'greedy'}")
