"""What only compiled kernels show: reads beside a tensor, 64-bit offsets; and which calls are refused."""

from collections.abc import Callable

import torch
from torch import Tensor

from dkv import kernels
from dkv.bench import gpu_baselines as eager
from dkv.bench.gpu_tools import (
    check,
    check_each,
    close,
    distinct,
    need_gpu,
    need_memory,
    raises,
    randn,
    same,
    surrounded,
    visible,
)  # fmt: skip
from dkv.kernels.choose import reference


@check_each("nothing_beside_a_tensor_is_used", (torch.float32, torch.bfloat16))
def nothing_beside_a_tensor_is_used(device, dtype) -> None:
    """Casebook A04: slices of tensors of NaN and nonsense; what surrounds an output is left alone."""
    b, n, s, kv_heads, heads, size = 2, 5, 33, 2, 4, 80
    shapes = ((b, n, heads, size), (b, s, kv_heads, size), (b, s, kv_heads, size))
    q, k, v = (randn(device, *shape, dtype=dtype) for shape in shapes)
    seen, ranges = (torch.rand(b, s) < 0.8).to(device), torch.tensor([[0, 33], [2, 31]], device=device)
    seen[:, 5] = True
    inner = [surrounded(x)[0] for x in (q, k, v)]
    out = kernels.cached_attention(*inner, key_mask=surrounded(seen)[0], key_ranges=surrounded(ranges)[0])
    rule = {"key_mask": seen, "key_ranges": ranges}
    exact = reference.cached_attention(q.double(), k.double(), v.double(), **rule)
    close(out, exact, eager.attention(q, k, v, visible(q, k, rule)), "attention")

    x, index = randn(device, b, s, size, dtype=dtype), distinct(device, b, n, s)
    (inside, _), (places, _) = surrounded(x), surrounded(index)
    same(kernels.gather_rows(inside, places), kernels.gather_rows(x, index), "gather")
    source = randn(device, b, n, size, dtype=dtype)
    wrapped = surrounded(source)[0]
    _unharmed(
        x, lambda y: kernels.scatter_rows_(y, places, wrapped), lambda y: reference.scatter_rows_(y, index, source),
        "scatter",
    )  # fmt: skip

    key, value = (randn(device, b, n, kv_heads, size, dtype=dtype) for _ in range(2))
    cos, sin = (surrounded(randn(device, s, size // 2))[0] for _ in range(2))
    buffers, guarded = [torch.zeros_like(k) for _ in range(2)], [surrounded(torch.zeros_like(k)) for _ in range(2)]
    query = kernels.rope_scatter_(q, key, value, cos.contiguous(), sin.contiguous(), index, *buffers)
    new = [surrounded(t)[0] for t in (q, key, value)]
    same(kernels.rope_scatter_(*new, cos, sin, places, *(g[0] for g in guarded)), query, "rotated queries")
    for buffer, (_, around), what in zip(buffers, guarded, ("keys", "values"), strict=True):
        same(around, surrounded(buffer)[1], what)

    logits = randn(device, 3, 1003, dtype=dtype)
    for rule in kernels.RULES:
        found, expected = (kernels.choose_token(y, rule=rule) for y in (surrounded(logits)[0], logits))
        same(found[0], expected[0], f"token, {rule}")
        close(found[1], expected[1].double(), expected[1], f"confidence, {rule}")
    hidden, weight = randn(device, 3, 72, dtype=dtype), randn(device, 515, 72, dtype=dtype)
    found = kernels.choose_token_fused(surrounded(hidden)[0], surrounded(weight)[0])
    same(found[0], kernels.choose_token_fused(hidden, weight)[0], "token of hidden states")

    canvas, token = torch.zeros(3, 19, dtype=torch.int64), torch.arange(57).view(3, 19) + 100
    confidence, eligible, count = torch.randn(3, 19).to(dtype), torch.rand(3, 19) < 0.7, torch.tensor([3, 0, 30])
    given = [x.to(device) for x in (token, confidence, eligible, count)]
    around = [surrounded(x)[0] for x in given]
    _unharmed(
        canvas.to(device), lambda y: kernels.commit_(y, *around), lambda y: reference.commit_(y, *given), "commit"
    )


def _unharmed(x: Tensor, run: Callable[[Tensor], object], define: Callable[[Tensor], object], what: str) -> None:
    """`run` does to a slice what `define` does to x, and nothing around the slice changes."""
    inner, around = surrounded(x)
    run(inner)
    expected = x.clone()
    define(expected)
    same(around, surrounded(expected)[1], what)


@check
def offsets_beyond_32_bits_buffer(device) -> None:
    """Casebook A08: the last slot of a buffer of 2,164,260,864 numbers is written, read and attended to."""
    need_memory(device, 11)
    b, s, heads, size = 129, 4096, 32, 128
    buffer, other = (torch.zeros(b, s, heads, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    marker = randn(device, 1, 1, heads, size, dtype=torch.bfloat16)
    source = torch.zeros(b, 1, heads, size, dtype=torch.bfloat16, device=device)
    source[-1:] = marker
    last = torch.full((b, 1), s - 1, device=device)
    query = torch.ones_like(source)
    ranges = torch.tensor([[s - 1, s]], device=device).expand(b, 2)

    def untouched(x: Tensor, what: str) -> None:
        dirty = [i for i in range(b) if bool((x[i] != 0).any())]
        assert dirty == [b - 1], f"{what}: rows {dirty} are not zero, only {b - 1} should be"
        assert not bool((x[-1, :-1] != 0).any()), f"{what}: other slots of the last row were written"

    kernels.scatter_rows_(buffer, last, source)
    same(buffer[-1:, -1:], marker, "scatter")
    untouched(buffer, "scatter")
    same(kernels.gather_rows(buffer, last.int()), source, "gather")
    for given in ({"key_ranges": ranges}, {}):
        out = kernels.cached_attention(query, buffer, buffer, **given)
        exact, plain = marker.double(), marker
        if not given:
            exact = reference.cached_attention(query[-1:].double(), buffer[-1:].double(), buffer[-1:].double())
            plain = eager.attention(query[-1:], buffer[-1:], buffer[-1:])
        close(out[-1:], exact, plain, f"attention {'of the last slot' if given else 'of all slots'}")
        assert not bool((out[:-1] != 0).any()), "attention: rows of zeros gave something else"
    buffer.zero_()
    flat = torch.ones(s, size // 2, device=device), torch.zeros(s, size // 2, device=device)
    kernels.rope_scatter_(source, source, source, *flat, last, buffer, other)
    for x, what in ((buffer, "keys"), (other, "values")):
        same(x[-1:, -1:], marker, what)
        untouched(x, what)


@check
def offsets_beyond_32_bits_position(device) -> None:
    """Casebook A10: slot 262,145 of rows of 8,192 numbers, named by int32 and int64."""
    need_memory(device, 6)
    x = torch.zeros(1, 262146, 8192, dtype=torch.bfloat16, device=device)
    marker = randn(device, 1, 1, 8192, dtype=torch.bfloat16)
    for integer in (torch.int32, torch.int64):
        index = torch.tensor([[262145]], device=device, dtype=integer)
        kernels.scatter_rows_(x, index, marker)
        same(kernels.gather_rows(x, index), marker, f"row by {integer}")
        same(x[:, -1:], marker, f"last row by {integer}")
        x[:, -1:] = 0
    assert not bool((x[0, :-1] != 0).any(1).any()), "other slots were written"


@check
def offsets_beyond_32_bits_logits(device) -> None:
    """Logits of 2^31 numbers and more, and no second copy of them (casebook B24)."""
    need_memory(device, 10)
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
    exact = -torch.log1p((v - 1) * torch.exp(torch.tensor(-9.0, dtype=torch.float64))).expand(r)
    close(confidence, exact, exact * (1 + 1e-6), "confidence")
    assert extra < logits.numel() * 2, f"{extra / 1e9:.1f} GB besides logits of {logits.numel() * 2 / 1e9:.1f} GB"


@check
def integers_of_both_widths(device) -> None:
    """Casebook A10: positions as int32 and int64 give the same bits."""
    q, k, v = (randn(device, 2, 7, h, 64) for h in (4, 2, 2))
    cos, sin, places = randn(device, 30, 32), randn(device, 30, 32), distinct(device, 2, 7, 30)
    lengths = torch.tensor([7, 3], device=device)
    found = []
    for integer in (torch.int32, torch.int64):
        buffers = torch.zeros(2, 2, 30, 2, 64, device=device)
        query = kernels.rope_scatter_(q, k, v, cos, sin, places.to(integer), *buffers, lengths=lengths.to(integer))
        ranges = torch.tensor([[0, 30], [3, 9]], device=device, dtype=integer)
        out = kernels.cached_attention(q, *buffers, key_ranges=ranges, query_lengths=lengths.to(integer))
        found.append((query[0], query[1, :3], buffers, out))
    for a, b in zip(*found, strict=True):
        same(a, b, "int32 and int64")


@check_each("wrong_index_is_refused_before_the_launch", (-1, 9))
def wrong_index_is_refused_before_the_launch(device, bad) -> None:
    """Casebook A19: one beyond each end of 9 slots."""
    x, around = surrounded(randn(device, 2, 9, 8))
    buffer, beside = surrounded(torch.zeros(2, 9, 1, 16, device=device))
    before, buffer_before = around.clone(), beside.clone()
    index = torch.tensor([[0, 1], [bad, 2]], device=device)
    source, new, table = (torch.ones(shape, device=device) for shape in ((2, 2, 8), (2, 2, 1, 16), (9, 8)))
    calls = {
        "gather": lambda: kernels.gather_rows(x, index),
        "scatter": lambda: kernels.scatter_rows_(x, index, source),
        "rotation": lambda: kernels.rope_scatter_(new, new, new, table, table, index, buffer, buffer),
    }
    for what, call in calls.items():
        raises((IndexError, ValueError), call, f"{what} at {bad}")
    same(around, before, "the tensor of a refused scatter")
    same(beside, buffer_before, "the buffer of a refused rotation")


@check
def tensors_on_two_devices_are_refused(device) -> None:
    """Casebook A14: the message names both."""
    need_gpu(device)
    x, index = randn(device, 2, 9, 8), torch.zeros(2, 1, dtype=torch.int64)
    message = raises(ValueError, lambda: kernels.gather_rows(x, index), "an index on the CPU")
    assert "cpu" in message and "cuda" in message, f"the message names no devices: {message}"
