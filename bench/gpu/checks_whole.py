"""All operations together: repeated bits, graphs, compilation, several devices, whole generations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dkv
from dkv import kernels
from dkv.bench.contenders import of_lineup
from dkv.bench.gpu import operations as table
from dkv.bench.gpu.cases import Inputs, distinct, mapped
from dkv.bench.gpu.tools import Skipped, check, equal, every_operation, need_gpu, same, small, thin, variable
from dkv.bench.shapes import random_model, shape, tiny
from dkv.kernels.common import backend
from dkv.models.joining import join_


def together(device: torch.device) -> tuple[Callable[[list[Inputs]], list[Tensor]], list[Inputs]]:
    """A function that calls every operation on inputs of its own, and gives all results; and the inputs."""
    cases = every_operation(device)

    def step(given: list[Inputs]) -> list[Tensor]:
        results: list[Tensor] = []
        for case, inputs in zip(cases, given, strict=True):
            own = {**inputs, **{name: inputs[name].clone() for name in case.written}}
            results += [*tree_leaves(case.run(own)), *(own[name] for name in case.written)]
        return results

    return step, [case.inputs for case in cases]


@check()
def repeated_calls_give_the_same_bits(device, few) -> None:
    step, inputs = together(device)
    first = step(inputs)
    for _ in range(5):
        equal(step(inputs), first, "result")


@check(torch.float32, torch.bfloat16)
def a_row_alone_and_in_a_batch_of_8(device, few, dtype) -> None:
    """With DKV_BATCH_INVARIANT=1 a row gives the same bits alone and among 8."""
    # Products of torch, and those of the interpreter, depend on the batch.
    need_gpu(device)
    if backend.chosen() != "triton":
        raise Skipped("the products of torch depend on the batch")
    with variable("DKV_BATCH_INVARIANT", "1"):
        for n, s in ((4, 700), (48, 300)):
            z, keys = small(dtype, 8, n, s), torch.arange(8 * n, device=device)[:, None]
            attention, logits = table.attention(z, device), table.choose(z, device, drawn=True, row_keys=keys)
            for case, rows in ((attention, 1), (logits, n), (table.choose_fused(z, device), n)):
                whole = tree_leaves(case.run(case.inputs))
                for row in range(8):
                    mine = slice(row * rows, row * rows + rows)
                    own = {name: x if name == "head_weight" else x[mine] for name, x in case.inputs.items()}
                    equal(case.run(own), [x[mine] for x in whole], f"{case}, row {row}, result")


@check()
def cuda_graph(device, few) -> None:
    """All operations captured once and replayed on other inputs."""
    need_gpu(device)
    step, inputs = together(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            step(inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inputs)
    rotation = inputs[0]
    for name in "qkv":
        rotation[name].copy_(torch.randn_like(rotation[name]))
    rotation["positions"].copy_(distinct(device, *rotation["positions"].shape, 40))
    graph.replay()
    torch.cuda.synchronize(device)
    equal(results, step(inputs), "replayed result")


@check()
def torch_compile(device, few) -> None:
    """One graph without breaks, equal results; tensors of inference mode too (casebook A21)."""
    step, inputs = together(device)
    expected = step(inputs)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = compiled([mapped(x, Tensor.clone) for x in inputs])
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            a, b = a.clone(), b.clone()
            if a.is_floating_point():
                off = (a - b).abs().max().item()
                assert off <= 1e-5 * b.abs().max().item(), f"compiled result {i}, {mode.__name__}: off by {off:.3g}"
            else:
                same(a, b, f"compiled result {i}, {mode.__name__}")


@check()
def second_device(device, few) -> None:
    """Casebook A14: everything on a device that is not the current one."""
    need_gpu(device, devices=2)
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    step, inputs = together(device)
    found = step([mapped(x, lambda t: t.to(other)) for x in inputs])
    assert all(x.device == other for x in found), f"results are on {sorted({str(x.device) for x in found})}"
    equal(found, step(inputs), "result")


POLICIES = {"none": "plain", "decode": "decode 8", "greedy": "greedy 4 planned", "prefill": "prefill", "pd": "pd 8"}
POLICIES |= {"skip": "skip"}


@check(*(f"{family}_{policy}" for family in ("llada", "dream") for policy in POLICIES))
def generation(device, few, case) -> None:
    """A small float32 model gives the tokens of the torch backend, padded prompts and drawn tokens included."""
    family, policy = case.split("_")
    # Drawn on the host: the same weights on every device.
    spec = tiny(shape({"llada": "llada-8b", "dream": "dream-7b"}[family]))
    model = random_model(spec, torch.device("cpu"), torch.float32, std=0.3).to(device)
    ids = torch.randint(spec.vocab_size - 1, (3, 11)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    own = of_lineup(POLICIES[policy]).settings
    every = ({}, {"confidence": "random"}, {"temperature": 0.9, "confidence": "margin"})
    # What skips slots goes by confidences.
    for settings in every[::2] if policy == "skip" else thin(few, every, 2):
        call = {"max_new_tokens": 20, "block_length": 10, "seed": 4, **own, **settings, "output_history": True}
        found = dkv.generate(model, ids, mask, **call)
        with kernels.use_backend("torch"):
            expected = dkv.generate(model, ids, mask, **call)
        same(found.history, expected.history, f"tokens by step, {settings or 'the surest first'}")


REPLAYED = {"none": "plain", "decode": "decode 8", "prefill": "prefill"}
REPLAYED |= {name: name for name in ("rollout", "elastic", "skip")}


@check(*(f"{family}_{policy}" for family in ("llada", "dream") for policy in REPLAYED))
def replayed_steps(device, few, case) -> None:
    """Steps from graphs give the tokens of steps one by one: two generations in turn, rows that end early, drawn."""
    need_gpu(device)
    family, policy = case.split("_")
    spec = tiny(shape({"llada": "llada-8b", "dream": "dream-7b"}[family]))
    model = join_(random_model(spec, torch.device("cpu"), torch.float32, std=0.3)).to(device)
    ids = torch.randint(spec.vocab_size - 1, (3, 11)).to(device)
    for settings in ({}, {"threshold": 0.5}, {"temperature": 0.9}, {"max_new_tokens": [40, 25, 9]}):
        call = {"max_new_tokens": 40, "seed": 4, **of_lineup(REPLAYED[policy]).settings, **settings}
        with variable("DKV_GRAPHS", "0"):
            expected = dkv.generate(model, ids, **call)
        drafts = [dkv.stream(model, ids, **call) for _ in range(2)]
        for pair in zip(*drafts, strict=True):
            found = pair
        for one in found:
            stats = one.stats
            assert stats.replayed_passes and stats.eager_reason is None, f"not all replayed: {stats.eager_reason}"
            same(one.sequences, expected.sequences, f"tokens, {settings or 'one a step'}")
