"""Every operation against its definition in float64, over shapes, dtypes and options."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from dkv import kernels
from dkv.bench.gpu import change, linear, packed, state
from dkv.bench.gpu import operations as table
from dkv.bench.gpu.cases import Sizes
from dkv.bench.gpu.tools import DTYPES, TINY, agree, check, small, thin
from dkv.kernels.commit.reference import RULES
from dkv.kernels.plan.reference import KINDS

HEAD_SIZES = (16, 32, 64, 80, 96, 112, 128, 192, 256)
GROUPS = (1, 2, 4, 7)
VISIBILITY = ("query_lengths", "key_ranges", "key_gaps", "key_mask", "mask", "block_ids")


def rules(device: torch.device, z: Sizes, names: Sequence[str], integer=torch.int64) -> dict[str, Any]:
    """Arguments that say who sees what; the last row of a batch is hidden wherever a rule can hide a row."""
    b, n, s = z.batch, z.active, z.slots
    stop = torch.randint(1, s + 1, (b,))
    start = torch.randint(0, s, (b,)).minimum(stop)
    every = {
        "query_lengths": torch.randint(1, n + 1, (b,)).to(integer),
        "key_ranges": torch.stack([start, stop], 1).to(integer),
        "key_gaps": torch.randint(0, s + 1, (b, 2)).sort(1).values.to(integer),
        "key_mask": torch.rand(b, s) < 0.6,
        "mask": torch.rand(b, n, s) < 0.6,
    }
    if b > 1:
        every["query_lengths"][-1] = 0
        every["key_ranges"][-1] = s // 2
        every["key_mask"][-1] = every["mask"][-1] = False
    blocks = (torch.randint(0, 4, (b, n)).to(integer), torch.randint(0, 5, (b, s)).to(integer))
    found = {name: every[name].to(device) for name in names if name != "block_ids"}
    return found | ({"block_ids": tuple(x.to(device) for x in blocks)} if "block_ids" in names else {})


# Every case below is another compilation of seconds. Hence options go round, so that each meets each, and are not
# multiplied.


@check(*DTYPES)
def attention(device, few, dtype) -> None:
    """All head sizes, with few and many queries; groups, rules and the log-sum-exp go round."""
    cases = []
    for i, size in enumerate(HEAD_SIZES[:: 2 if dtype == torch.float16 else 1]):
        for j, (n, s) in enumerate(((2, 700), (40, 131))):
            group = GROUPS[(i + 2 * j) % 4]
            z = small(dtype, 2, n, s, 2 if group < 4 else 1, group, size)
            cases.append((z, VISIBILITY[(i + j) % 5 :][:2], (i + j) % 2 == 0))
    for z, names, lse in thin(few, cases, 5):
        agree(table.attention(z, device, lse=lse, **rules(device, z, names)))


@check()
def attention_rules(device, few) -> None:
    """Every rule alone and all of them, with few and many queries, over odd lengths."""
    names = [(), *((name,) for name in VISIBILITY), VISIBILITY]
    shapes = [(3, 1, 1), (3, 5, 37), (2, 150, 257)]
    for i, (size, given) in enumerate(thin(few, list(product(shapes, names)), 5)):
        wide, half = small(torch.float32, *size), small(torch.bfloat16, *size, 1, 4, 80)
        agree(table.attention(wide, device, lse=i % 2 == 0, **rules(device, wide, given)))
        agree(table.attention(half, device, lse=i % 2 == 1, **rules(device, half, given, torch.int32)))


@check(*DTYPES)
def rope_scatter(device, few, dtype) -> None:
    """All head sizes and groups, with a norm and tables in float32, and with neither."""
    for i, size in enumerate(thin(few, HEAD_SIZES, 5)):
        z = small(dtype, 3, 9, 21, 2, GROUPS[i % 4], size)
        own = replace(z, spec=replace(z.spec, rope_float32=False))
        agree(table.rope_scatter(z, device, norm=True), table.rope_scatter(own, device))


@check(*DTYPES)
def packed_rows(device, few, dtype) -> None:
    """Rows of different lengths one after the other, with few and many queries; with a gap, or ends of the queries, in
    blocks or causal; heads of which a part is rotated."""
    for i, (b, n, s) in enumerate(thin(few, [(3, 5, 37), (1, 9, 40), (4, 150, 257), (8, 64, 700)], 3)):
        z = small(dtype, b, n, s, 2, GROUPS[i], HEAD_SIZES[2 * i + 1])
        agree(*(packed.attention(z, device, gap) for gap in (False, True)), packed.rope_scatter(z, device))
        agree(*(packed.attention(z, device, i % 2 == 1, block) for block in (1, 32)), packed.rope_scatter(z, device, 4))


@check(*DTYPES)
def attention_mass(device, few, dtype) -> None:
    """All head sizes and groups, with few and many queries, over rows that differ in both lengths."""
    shapes = [(2, 2, 700), (1, 9, 40), (3, 40, 131), (4, 150, 257)]
    for i, size in enumerate(thin(few, HEAD_SIZES, 5)):
        agree(table.mass(small(dtype, *shapes[i % 4], 2, GROUPS[i // 2 % 4], size), device))


def rows_of_logits(dtype: torch.dtype, rows: int, vocabulary: int, d: int = 64) -> Sizes:
    spec = replace(TINY, vocab_size=vocabulary, hidden_size=d, mask_token_id=vocabulary // 3)
    return Sizes(spec, 1, rows, rows, dtype)


@check(*kernels.RULES)
def choose_token(device, few, rule) -> None:
    """Vocabularies of all sizes, banned ids and a limit among them."""
    for dtype, size in thin(few, list(product(DTYPES, [2, 50, 1000, 32007, 126464, 152064])), 4):
        how = {"vocab_limit": size - 7, "banned": (0, 1, size // 2)} if size > 2 else {"banned": ()}
        agree(table.choose(rows_of_logits(dtype, 5, size), device, rule=rule, **how))


@check(*kernels.RULES)
def entropies(device, few, rule) -> None:
    """The entropy of logits and of hidden states, by the kernel and in strips; and the digits of one next to 0."""
    sizes = [(5, 64, 32007), (130, 512, 2048), *([] if few else [(200, 64, 126464)])]
    for dtype, (r, d, v) in thin(few, list(product(DTYPES, sizes)), 3):
        z = rows_of_logits(dtype, r, v, d)
        agree(table.choose(z, device, rule=rule, entropy=True, vocab_limit=v - 7, confidence_temperature=0.5))
        case = table.choose_fused(z, device, rule, bias=True, entropy=True)
        agree(case)
        for way in {"fused", "strips"} & case.others.keys():
            case.check(way)
    logits = torch.zeros(4, 5000)
    logits[:, 77] = gaps = torch.tensor([20.0, 26.0, 32.0, 36.0])
    _, _, entropy = kernels.choose_token(logits.to(device), rule=rule, return_entropy=True)
    tail = 4999 * torch.exp(-gaps.double())
    exact = torch.log1p(tail) + tail * gaps.double() / (1 + tail)
    off = (entropy.cpu().double() / exact - 1).abs().max().item()
    assert off < 1e-5, f"entropies next to 0 are off by a factor of {1 + off:.7f}"


@check()
def choose_token_filters(device, few) -> None:
    """top-k, top-p and both temperatures."""
    for options in ({"top_k": 5}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9}, {"confidence_temperature": 0.5}):
        agree(*(table.choose(rows_of_logits(torch.float32, 6, 999), device, rule=r, **options) for r in kernels.RULES))


@check()
def choose_token_tail(device, few) -> None:
    """Confidences next to 1 keep their order and their digits; equal logits go to the lowest id."""
    gaps = torch.tensor([20.0, 30.0, 40.0, 60.0])
    logits = torch.zeros(4, 5000)
    logits[:, 77] = gaps
    token, confidence = kernels.choose_token(logits.to(device))
    exact = -torch.log1p(4999 * torch.exp(-gaps.double()))
    assert token.tolist() == [77] * 4, f"tokens {token.tolist()}"
    off = (confidence.cpu().double() / exact - 1).abs().max().item()
    assert off < 1e-4, f"confidences next to 1 are off by a factor of {1 + off:.6f}"
    for dtype in DTYPES:
        ties = torch.zeros(9, 40000, dtype=dtype, device=device)
        for row in range(9):
            ties[row, row * 4000 :: 1000] = 2
        assert kernels.choose_token(ties)[0].tolist() == [row * 4000 for row in range(9)], f"ties, {dtype}"


@check(*DTYPES)
def choose_token_fused(device, few, dtype) -> None:
    sizes = [(1, 64, 1000), (5, 128, 32007), (33, 257, 4099), (130, 512, 2048), *([] if few else [(200, 64, 70000)])]
    cases = [(z, kernels.RULES[(i + bias) % 3], bias) for i, z in enumerate(sizes) for bias in (False, True)]
    for (r, d, v), rule, bias in thin(few, cases, 3):
        case = table.choose_fused(rows_of_logits(dtype, r, v, d), device, rule, bias)
        agree(case)
        for way in {"fused", "strips"} & case.others.keys():
            case.check(way)


@check(*DTYPES)
def few_bits(device, few, dtype) -> None:
    """Products with weights of 8 and 4 bits, for all regimes of rows, experts among them; and a head of 8 bits."""
    for i, rows in enumerate(thin(few, (1, 17, 64, 130, 700), 3)):
        z = Sizes(replace(TINY, hidden_size=(192, 1056)[i % 2], intermediate_size=150), 1, rows, rows, dtype)
        for make in (linear.linear8, linear.linear4):
            agree(make(z, device, bias=i % 2 == 0), make(z, device, experts=5))
    # Inputs that are divided among several programs.
    down = Sizes(replace(TINY, hidden_size=301, intermediate_size=4000), 1, 33, 33, dtype)
    agree(linear.linear8(down, device, down=True), linear.linear4(down, device, down=True))
    sizes = zip([(5, 128, 32007), (33, 257, 4099), (200, 64, 7000)], kernels.RULES, strict=True)
    for (r, d, v), rule in thin(few, list(sizes), 2):
        agree(table.choose_fused(rows_of_logits(dtype, r, v, d), device, rule, bias=d < 200, eight=True))


@check()
def drawn_tokens_are_those_of_the_definition(device, few) -> None:
    """The random bits are the same on every device, for keys of several columns."""
    for columns, size in ((1, 100), (3, 5000), (2, 40000)):
        keys, logits = torch.randint(-(2**40), 2**40, (32, columns)), torch.randn(32, size)
        with kernels.use_backend("reference"):
            expected, _ = kernels.choose_token(logits, temperature=0.7, row_keys=keys)
        how = {"temperature": 0.7, "row_keys": keys.to(device)}
        found, _ = kernels.choose_token(logits.to(device), **how)
        fused, _ = kernels.choose_token_fused(torch.eye(32, device=device), logits.T.contiguous().to(device), **how)
        for form, token in (("logits", found), ("hidden states", fused)):
            # Logarithms differ in the last place from device to device, which may decide a near tie.
            differ = int((token.cpu() != expected).sum())
            assert differ <= 1, f"{form}, keys of {columns}: {differ} of 32 tokens are not those of the definition"


@check()
def sampling_distribution(device, few) -> None:
    """Chi-square of drawn ids against the softmax, 20,000 rows each."""
    draws = 20000
    for logits, temperature in (([800.0, 799.0], 1.0), ([2.0, 1.0, 0.0], 0.7), ([0.0] * 50, 1.0), ([5.0, 0.0], 2.0)):
        for dtype in thin(few, DTYPES, 3):
            x = torch.tensor(logits, device=device, dtype=dtype).repeat(draws, 1)
            token, _ = kernels.choose_token(x, temperature=temperature)
            expected = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1) * draws
            found = token.cpu().bincount(minlength=len(logits)).double()
            statistic, freedom = ((found - expected).square() / expected).sum().item(), len(logits) - 1
            # Beyond the quantile of one in 10^6 for these degrees of freedom.
            bound = freedom + 6 * math.sqrt(2 * freedom) + 16
            assert statistic < bound, f"{logits[:3]} at {temperature}, {dtype}: {statistic:.1f} over {bound:.1f}"


@check(*DTYPES)
def hidden_states(device, few, dtype) -> None:
    """Norms, gates, change and store. Odd and even sizes, up to those beyond a tile."""
    for size in thin(few, (1, 64, 1000, 2048, 3584, 4096, 8192, 16384, 16385), 4):
        spec = replace(TINY, hidden_size=size, intermediate_size=size)
        z = replace(small(dtype, 2, 33, 40), spec=spec)
        agree(table.norm(z, device))
        agree(table.gate(z, device))
        agree(change.change(z, device), change.keep(z, device))


@check()
def commit(device, few) -> None:
    """Equal to the definition, ties included, for any count; casebook A17."""
    for b, n, s in thin(few, [(1, 1, 1), (3, 5, 9), (8, 32, 64), (4, 700, 700), (2, 2048, 2100)], 2):
        for steps in (0, 4):
            count = torch.randint(0, n + 2, (b,)).to(device)
            agree(table.commit(small(torch.float32, b, n, s), device, count, steps))
    ones = torch.ones(1, 8, dtype=torch.int64, device=device)
    half = torch.full((1, 8), 0.5, device=device, dtype=torch.bfloat16)
    for _ in range(10):
        done = kernels.commit_(ones.clone(), ones, half, ones.bool(), torch.tensor([3], device=device))
        assert done.nonzero()[:, 1].tolist() == [0, 1, 2], "equal confidences did not go to the lowest positions"
    close = torch.tensor([[0.99609, 0.997, 0.998]], device=device).log()
    done = kernels.commit_(ones[:, :3].clone(), ones[:, :3], close, ones[:, :3].bool(), ones[0, :1])
    assert done.tolist() == [[False, False, True]], "confidences next to 1 were not told apart"


# Rows, active slots, slots: within a tile and over several; a cached step and a full one.
STATES = [(3, 9, 70), (1, 1, 1), (2, 40, 40), (2, 300, 1500), (70, 5, 33)]


@check(*KINDS)
def plan(device, few, kind) -> None:
    """What a pass computes, scores, fills and reports, and its entries."""
    for i, size in enumerate(thin(few, STATES, 5)):
        z, (shifted, dynamic) = small(torch.float32, *size), divmod(i % 4, 2)
        agree(state.plan(z, device, kind, shifted=bool(shifted), dynamic=bool(dynamic), by_chance=i == 3))
        agree(state.pack(z, device, bool(shifted)), state.window(z, device, size=7 * i + 1))


@check(*RULES)
def advance(device, few, rule) -> None:
    """The state after a step, by every rule, with and without ends."""
    for i, size in enumerate(thin(few, STATES, 5)):
        z, dtype = small(torch.float32, *size), DTYPES[i % 3]
        for ends in (None, (1, 2)):
            agree(state.advance(z, device, rule, ends, 3 * i, dtype, finite_only=i % 2 == 1))
