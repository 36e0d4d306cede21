"""What only compiled kernels show: reads beside a tensor, 64-bit offsets; and which calls are refused."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dkv import kernels
from dkv.bench.gpu import operations as table
from dkv.bench.gpu.cases import Inputs, mapped, randn
from dkv.bench.gpu.tools import check, equal, every_operation, need_gpu, same, small


def surrounded(x: Tensor) -> Tensor:
    """x as a slice of a larger tensor of NaN; of integers that are out of every range; of True."""
    integers = {torch.bool: True, torch.int8: 99, torch.uint8: 255, torch.int32: 2**30, torch.int64: 2**40}
    nonsense = integers.get(x.dtype, torch.nan)
    around = torch.full([size + 2 for size in x.shape], nonsense, dtype=x.dtype, device=x.device)
    return around[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


@check(torch.float32, torch.bfloat16)
def nothing_beside_a_tensor_is_used(device, few, dtype) -> None:
    """Casebook A04: slices of tensors of NaN and nonsense; what surrounds an output is left alone."""
    for case in every_operation(device, dtype):
        alone, inner = (mapped(case.inputs, change) for change in (Tensor.clone, surrounded))
        whole = {name: inner[name]._base.clone() for name in case.written}
        equal(case.run(inner), case.run(alone), f"{case}, result")
        for name, before in whole.items():
            before[tuple(slice(1, -1) for _ in before.shape)] = alone[name]
            same(inner[name]._base, before, f"{case}, {name} and what surrounds it")


def marked(device: torch.device, b: int, s: int, heads: int, size: int) -> Tensor:
    """A buffer [b, s, heads, size] of zeros, but for the numbers that rope_scatter_ wrote into its last slot."""
    buffers = [torch.zeros(b, s, heads, size, dtype=torch.bfloat16, device=device) for _ in range(2)]
    source = torch.zeros(b, 1, heads, size, dtype=torch.bfloat16, device=device)
    source[-1:] = marker = randn(device, 1, 1, heads, size, dtype=torch.bfloat16)
    flat = torch.ones(s, size // 2, device=device), torch.zeros(s, size // 2, device=device)
    last = torch.full((b, 1), s - 1, device=device)
    for integer in (torch.int32, torch.int64):
        for x in buffers:
            x[-1, -1] = 0
        kernels.rope_scatter_(source, source, source, *flat, last.to(integer), *buffers)
        for x, what in zip(buffers, ("keys", "values"), strict=True):
            same(x[-1:, -1:], marker, f"{what} at slots given as {integer}")
    for x, what in zip(buffers, ("keys", "values"), strict=True):
        dirty = [row for row in range(b) if bool((x[row] != 0).any())]
        assert dirty == [b - 1], f"{what}: rows {dirty} are not zero, only {b - 1} should be"
        assert not bool((x[-1, :-1] != 0).any()), f"{what}: other slots of the last row were written"
    return buffers[0]


@check()
def offsets_beyond_32_bits_buffer(device, few) -> None:
    """Casebook A08: the last slot of a buffer of 2,164,260,864 numbers is written, read and attended to."""
    need_gpu(device, 11)
    b, s = 129, 4096
    buffer = marked(device, b, s, 32, 128)
    query, ranges = torch.ones_like(buffer[:, :1]), torch.tensor([[s - 1, s]], device=device).expand(b, 2)
    for given in ({"key_ranges": ranges}, {}):
        out = kernels.cached_attention(query, buffer, buffer, **given)
        own = {"key_ranges": ranges[-1:]} if given else {}
        with kernels.use_backend("reference"):
            exact = kernels.cached_attention(*(x[-1:].double() for x in (query, buffer, buffer)), **own)
        off = (out[-1:].double() - exact).abs().max().item()
        assert off <= 0.02 * exact.abs().max().item(), f"attention with {list(given)}: off by {off:.3g}"
        assert not bool((out[:-1] != 0).any()), "attention: rows of zeros gave something else"


@check()
def offsets_beyond_32_bits_position(device, few) -> None:
    """Casebook A10: slot 262,145 of rows of 8,192 numbers, given as int32 and int64."""
    need_gpu(device, 10)
    marked(device, 1, 262146, 64, 128)


@check()
def offsets_beyond_32_bits_logits(device, few) -> None:
    """Logits of 2^31 numbers and more, and no second copy of them (casebook B24)."""
    need_gpu(device, 10)
    r, v = 17000, 126464
    logits = torch.zeros(r, v, dtype=torch.bfloat16, device=device)
    best = torch.randint(v, (r,), device=device)
    logits.scatter_(1, best[:, None], 9.0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    token, confidence = kernels.choose_token(logits, validate=False)
    extra = torch.cuda.max_memory_allocated(device) - held
    same(token, best, "tokens")
    exact = -torch.log1p((v - 1) * torch.exp(torch.tensor(-9.0, dtype=torch.float64))).item()
    off = (confidence.double() / exact - 1).abs().max().item()
    assert off < 1e-5, f"confidences are off by a factor of {1 + off:.6f}"
    assert extra < logits.numel() * 2, f"{extra / 1e9:.1f} GB besides logits of {logits.numel() * 2 / 1e9:.1f} GB"


@check(4, 8)
def offsets_beyond_32_bits_weight(device, few, bits) -> None:
    """The last outputs of the last of 65 experts, of 33.5 million bytes each."""
    need_gpu(device, 10)
    experts, outputs, inputs = 65, 8192, 4096 if bits == 8 else 8192
    if bits == 8:
        operation, group = kernels.int8_linear, ()
        weight = torch.zeros(experts, outputs, inputs, dtype=torch.int8, device=device)
        weight[-1, -3:] = torch.tensor([[1], [2], [3]], device=device)
    else:
        operation, group = kernels.int4_linear, (inputs // 128,)
        weight = torch.full((experts, outputs, inputs // 2), 0x88, dtype=torch.uint8, device=device)
        weight[-1, -3:] = torch.tensor([[0x99], [0xAA], [0xBB]], device=device)
    ends = torch.zeros(experts, dtype=torch.int32, device=device)
    ends[-1] = 2
    x, scales = torch.ones(2, inputs, device=device).bfloat16(), torch.ones(experts, outputs, *group, device=device)
    expected = torch.zeros(2, outputs, dtype=torch.bfloat16, device=device)
    expected[:, -3:] = inputs * torch.arange(1, 4, device=device)
    same(operation(x, weight, scales, ends=ends), expected, f"a product with weights of {bits} bits")


@check()
def integers_of_both_widths(device, few) -> None:
    """Casebook A10: positions, lengths and ranges as int32 and int64 give the same bits."""
    z = small(torch.float32, 2, 7, 30)
    lengths = torch.tensor([7, 3], device=device)
    for case in (table.rope_scatter(z, device), table.attention(z, device, ragged=True, query_lengths=lengths)):
        wide, narrow = (
            mapped(case.inputs, lambda x, integer=integer: x.to(integer) if x.dtype == torch.int64 else x.clone())
            for integer in (torch.int64, torch.int32)
        )
        equal(case.run(wide), case.run(narrow), f"{case}, result")
        for name in case.written:
            same(wide[name], narrow[name], f"{case}, {name}")


def refused(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], what: str) -> str:
    """The message of the error that `call` must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what}: no error")


def _rotation(device: torch.device) -> Inputs:
    return table.rope_scatter(small(torch.float32, 2, 2, 9), device).inputs


@check(-1, 9)
def wrong_index_is_refused_before_the_launch(device, few, bad) -> None:
    """Casebook A19: one beyond each end of 9 slots."""
    inputs = mapped(_rotation(device), surrounded)
    inputs["positions"] = torch.tensor([[0, 1], [bad, 2]], device=device)
    before = {name: inputs[name]._base.clone() for name in ("k_buf", "v_buf")}
    refused((IndexError, ValueError), lambda: kernels.rope_scatter_(**inputs), f"rotation at {bad}")
    for name, was in before.items():
        same(inputs[name]._base, was, f"{name} of a refused rotation")


@check()
def tensors_on_two_devices_are_refused(device, few) -> None:
    """Casebook A14: the message names both."""
    need_gpu(device)
    inputs = _rotation(device)
    inputs["positions"] = inputs["positions"].cpu()
    message = refused(ValueError, lambda: kernels.rope_scatter_(**inputs), "positions on the CPU")
    assert "cpu" in message and "cuda" in message, f"the message names no devices: {message}"
