"""Every operation against float64, over shapes, dtypes and options."""

import itertools
import math

import torch
from torch import Tensor

from dkv import kernels
from dkv.bench import gpu_baselines as eager
from dkv.bench.gpu_tools import (
    DTYPES,
    RULES,
    check,
    check_each,
    close,
    distinct,
    randn,
    rules,
    same,
    thin,
    visible,
)  # fmt: skip
from dkv.kernels.choose import reference
from dkv.kernels.common import noise

HEAD_SIZES = (16, 32, 64, 80, 96, 112, 128, 192, 256)
GROUPS = (1, 2, 4, 7)


def attention_case(device, dtype, b, n, s, kv_heads, group, size, names, with_lse, integer=torch.int64) -> None:
    what = f"{dtype} B{b} N{n} S{s} Hkv{kv_heads} G{group} D{size} {' '.join(names)}"
    q, k, v = (
        randn(device, *shape, dtype=dtype)
        for shape in ((b, n, kv_heads * group, size), (b, s, kv_heads, size), (b, s, kv_heads, size))
    )
    given = rules(device, b, n, s, names, integer)
    found = kernels.cached_attention(q, k, v, **given, return_lse=with_lse)
    out, lse = found if with_lse else (found, None)
    exact, exact_lse = reference.cached_attention(q.double(), k.double(), v.double(), **given, return_lse=True)
    seen = visible(q, k, given)
    plain = eager.attention(q, k, v, seen)
    if seen is not None:
        plain = plain.masked_fill(~seen.any(-1)[:, :, None, None], 0)
    close(out, exact, plain, what)
    if with_lse:
        # Scores and sums are accumulated in float32 whatever the dtype.
        plain_lse = reference.cached_attention(q.float(), k.float(), v.float(), **given, return_lse=True)[1]
        close(lse, exact_lse, plain_lse, f"log-sum-exp of {what}")


# Every case below is another compilation of seconds. Hence options go round, so that each meets each, and are not
# multiplied.


@check_each("attention", DTYPES)
def attention(device, dtype) -> None:
    """All head sizes, with few and many queries; groups, rules and the log-sum-exp go round."""
    cases = []
    for i, size in enumerate(HEAD_SIZES[:: 2 if dtype == torch.float16 else 1]):
        for j, (n, s) in enumerate(((2, 700), (40, 131))):
            group = GROUPS[(i + 2 * j) % 4]
            names = RULES[(i + j) % 5 :][:2]
            cases.append((2, n, s, 2 if group < 4 else 1, group, size, names, (i + j) % 2 == 0))
    for case in thin(device, cases):
        attention_case(device, dtype, *case)


@check
def attention_rules(device) -> None:
    """Every rule alone and all of them, with few and many queries, over odd lengths."""
    names = [(), *((name,) for name in RULES), RULES]
    shapes = [(3, 1, 1), (3, 5, 37), (2, 150, 257)]
    for i, ((b, n, s), given) in enumerate(thin(device, list(itertools.product(shapes, names)))):
        attention_case(device, torch.float32, b, n, s, 2, 2, 64, given, i % 2 == 0)
        attention_case(device, torch.bfloat16, b, n, s, 1, 4, 80, given, i % 2 == 1, torch.int32)


@check_each("rope_scatter", DTYPES)
def rope_scatter(device, dtype) -> None:
    shapes = list(zip(HEAD_SIZES, (1, 2, 4, 7, 1, 2, 4, 7, 1), strict=True))
    for size, group in thin(device, shapes):
        for tables, norm, ragged in ((torch.float32, True, True), (dtype, False, False)):
            _rope_scatter_case(device, dtype, size, group, tables, norm, ragged)


def _rope_scatter_case(device, dtype, size, group, tables, norm, ragged) -> None:
    b, n, s, kv_heads = 3, 9, 21, 2
    what = f"{dtype} D{size} G{group} tables {tables}{' norm, bias' * norm}{' ragged' * ragged}"
    q, k, v = (randn(device, b, n, h, size, dtype=dtype) for h in (kv_heads * group, kv_heads, kv_heads))
    angle = torch.rand(s, size // 2) * 6
    cos, sin = (x.to(device, tables) for x in (angle.cos(), angle.sin()))
    options = {}
    if norm:
        gain = randn(device, 2, size, dtype=dtype)
        options = {"q_norm": (gain[0], 1e-6), "k_norm": (gain[1], 1e-5)}
        for name, heads in (("q_bias", kv_heads * group), ("k_bias", kv_heads), ("v_bias", kv_heads)):
            options[name] = randn(device, heads, size, dtype=dtype)
    lengths = torch.tensor([n, 4, 0], device=device) if ragged else None
    positions = distinct(device, b, n, s)
    buffers = [torch.full((b, s, kv_heads, size), 7.0, device=device, dtype=dtype) for _ in range(2)]
    query = kernels.rope_scatter_(q, k, v, cos, sin, positions, *buffers, lengths=lengths, **options)
    wide_options = {name: (x[0].double(), x[1]) if isinstance(x, tuple) else x.double() for name, x in options.items()}
    results = []
    for convert, given in ((Tensor.double, wide_options), (Tensor.clone, options)):
        own = [torch.full_like(convert(buffers[0]), 7.0) for _ in range(2)]
        arguments = (convert(x) for x in (q, k, v, cos, sin))
        results.append((reference.rope_scatter_(*arguments, positions, *own, lengths=lengths, **given), *own))
    (exact, exact_k, exact_v), (plain, plain_k, plain_v) = results
    used = torch.ones(b, n, dtype=torch.bool, device=device)
    if lengths is not None:
        used = torch.arange(n, device=device) < lengths[:, None]
    close(query[used], exact[used], plain[used], f"queries, {what}")
    close(buffers[0], exact_k, plain_k, f"keys, {what}")
    close(buffers[1], exact_v, plain_v, f"values, {what}")


@check
def rows(device) -> None:
    """Rows of every dtype and width go and come back unchanged; int32 and int64 indices alike."""
    for dtype in (*DTYPES, torch.int64, torch.int32, torch.bool):
        for tail in ((), (5,), (3, 129), (4096,)):
            x = (randn(device, 3, 50, *tail) * 9).to(dtype)
            index = distinct(device, 3, 17, 50)
            row = torch.arange(3, device=device)[:, None]
            for integer in (torch.int64, torch.int32):
                what = f"{dtype} {tail} by {integer}"
                got = kernels.gather_rows(x, index.to(integer))
                same(got, x[row, index], f"gather {what}")
                source = (randn(device, 3, 17, *tail) * 9).to(dtype)
                expected = x.clone()
                expected[row, index] = source
                same(kernels.scatter_rows_(x.clone(), index.to(integer), source), expected, f"scatter {what}")


def _plain_confidence(logits: Tensor, closed: list[int], rule: str) -> Tensor:
    """The confidences of a float32 softmax, [R]; ids in `closed` cannot be chosen."""
    p = logits.float().softmax(-1)
    if rule == "entropy":
        return -torch.special.entr(p).sum(-1)
    p[:, closed] = 0
    best = p.topk(min(2, p.shape[1])).values
    return (best[:, 0] - best[:, -1] if rule == "margin" else best[:, 0]).log()


@check_each("choose_token", kernels.RULES)
def choose_token(device, rule) -> None:
    sizes = [2, 50, 1000, 32007, 126464, 152064]
    for dtype, size in thin(device, list(itertools.product(DTYPES, sizes)), 4):
        logits = randn(torch.device("cpu"), 5, size, dtype=dtype) * 3
        how, closed = {"rule": rule}, []
        if size > 2:
            closed = [int(logits[0].argmax()), 1, *range(size - 7, size)]
            how |= {"banned": tuple(closed[:2]), "vocab_limit": size - 7}
        exact_token, exact = reference.choose_token(logits.double(), **how)
        token, confidence = kernels.choose_token(logits.to(device), **how)
        what = f"{rule} {dtype} V{size}"
        same(token, exact_token, f"token, {what}")
        close(confidence, exact, _plain_confidence(logits, closed, rule), what)


@check
def choose_token_filters(device) -> None:
    """top-k, top-p and both temperatures."""
    for options in ({"top_k": 5}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9}, {"confidence_temperature": 0.5}):
        for rule in kernels.RULES:
            logits = randn(torch.device("cpu"), 6, 999) * 3
            how = {"rule": rule, **options, "banned": (3,)}
            exact_token, exact = reference.choose_token(logits.double(), **how)
            plain = reference.choose_token(logits, **how)[1]
            token, confidence = kernels.choose_token(logits.to(device), **how)
            same(token, exact_token, f"token, {how}")
            close(confidence, exact, plain, str(how))


@check
def choose_token_tail(device) -> None:
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


@check_each("choose_token_fused", DTYPES)
def choose_token_fused(device, dtype) -> None:
    sizes = [(1, 64, 1000), (5, 128, 32007), (33, 257, 4099), (130, 512, 2048)]
    cases = [(z, kernels.RULES[(i + bias) % 3], bias) for i, z in enumerate(sizes) for bias in (False, True)]
    for (r, d, v), rule, bias in thin(device, cases, 3):
        hidden, weight = randn(device, r, d, dtype=dtype), randn(device, v, d, dtype=dtype) / math.sqrt(d) * 3
        head_bias = randn(device, v, dtype=dtype) if bias else None
        token, confidence = kernels.choose_token_fused(hidden, weight, head_bias=head_bias, rule=rule, banned=(3,))
        what = f"{rule} {dtype} R{r} d{d} V{v}{' bias' * bias}"
        exact, plain = ((a @ b.T).cpu() for a, b in ((hidden.double(), weight.double()), (hidden, weight)))
        if bias:
            exact, plain = exact + head_bias.double().cpu(), plain + head_bias.cpu()
        best = exact.clone()
        best[:, 3] = -torch.inf
        loss = best.max(-1).values - best.gather(1, token.cpu()[:, None])[:, 0]
        allowed = 4 * (plain.double() - exact).abs().max().item() + 1e-5
        assert loss.max().item() <= allowed, f"{what}: a token {loss.max().item():.3g} below the best, {allowed:.3g}"
        exact_confidence = reference.choose_token(exact, rule=rule, banned=(3,))[1]
        if rule == "margin":
            # Equal logits in half precision have the margin 0, whose logarithm says nothing about an error.
            confidence, exact_confidence = confidence.exp(), exact_confidence.exp()
        # A confidence is as uncertain as the logits it is made of, of which plain torch has the error.
        close(confidence, exact_confidence, exact_confidence + (plain.double() - exact).abs().max(), what)


@check
def noise_is_that_of_the_definition(device) -> None:
    """Drawn ids are those of `dkv.kernels.noise` on the CPU, for odd seeds and keys of several columns."""
    for seed, columns, size in ((0, 1, 100), (-5, 3, 5000), (2**62 + 12345, 2, 40000)):
        keys = torch.randint(-(2**40), 2**40, (32, columns))
        logits = torch.randn(32, size)
        noisy = (logits / 0.7 + noise.gumbel(seed, keys, size)).double()
        for form in ("logits", "hidden"):
            how = {"temperature": 0.7, "seed": seed, "row_keys": keys.to(device)}
            if form == "logits":
                token = kernels.choose_token(logits.to(device), **how)[0].cpu()
            else:
                wide = torch.eye(32, device=device)
                token = kernels.choose_token_fused(wide, logits.T.contiguous().to(device), **how)[0].cpu()
            loss = noisy.max(-1).values - noisy.gather(1, token[:, None])[:, 0]
            # Logarithms differ in the last place from device to device, the random bits must not.
            assert loss.max().item() < 1e-4, f"{form}, seed {seed}: a token {loss.max().item():.3g} below the winner"


@check
def sampling_distribution(device) -> None:
    """Chi-square of drawn ids against the softmax, 20,000 rows each."""
    draws = 20000
    for logits, temperature in (([800.0, 799.0], 1.0), ([2.0, 1.0, 0.0], 0.7), ([0.0] * 50, 1.0), ([5.0, 0.0], 2.0)):
        for dtype in thin(device, DTYPES, 3):
            x = torch.tensor(logits, device=device, dtype=dtype).repeat(draws, 1)
            token = kernels.choose_token(x, temperature=temperature, seed=3)[0]
            expected = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1) * draws
            found = token.cpu().bincount(minlength=len(logits)).double()
            statistic, freedom = ((found - expected).square() / expected).sum().item(), len(logits) - 1
            # Beyond the quantile of one in 10^6 for these degrees of freedom.
            bound = freedom + 6 * math.sqrt(2 * freedom) + 16
            assert statistic < bound, f"{logits[:3]} at {temperature}, {dtype}: {statistic:.1f} over {bound:.1f}"


@check
def commit(device) -> None:
    """Equal to the definition, ties included, for any count; casebook A17."""
    for b, n, s in thin(device, [(1, 1, 1), (3, 5, 9), (8, 32, 64), (4, 700, 700), (2, 2048, 2100)], 2):
        for with_positions in (False, True):
            size = s if with_positions else n
            canvas, token = torch.randint(0, 99, (b, size)), torch.randint(100, 200, (b, n))
            confidence = torch.randint(-6, 1, (b, n)).float() / 4
            eligible, count = torch.rand(b, n) < 0.7, torch.randint(0, n + 2, (b,))
            positions = distinct(torch.device("cpu"), b, n, s) if with_positions else None
            threshold = -0.25 if with_positions else None
            own = canvas.to(device)
            place = None if positions is None else positions.to(device)
            arguments = [x.to(device) for x in (token, confidence, eligible, count)]
            done = kernels.commit_(own, *arguments, positions=place, threshold=threshold)
            expected = reference.commit_(
                canvas, token, confidence, eligible, count, positions=positions, threshold=threshold
            )
            same(done, expected, f"committed, B{b} N{n}")
            same(own, canvas, f"canvas, B{b} N{n}")
    ones = torch.ones(1, 8, dtype=torch.int64, device=device)
    for _ in range(10):
        half = torch.full((1, 8), 0.5, device=device, dtype=torch.bfloat16)
        done = kernels.commit_(ones.clone(), ones, half, ones.bool(), torch.tensor([3], device=device))
        assert done.nonzero()[:, 1].tolist() == [0, 1, 2], "equal confidences did not go to the lowest positions"
    close_ones = torch.tensor([[0.99609, 0.997, 0.998]], device=device).log()
    three = ones[:, :3]
    done = kernels.commit_(three.clone(), three, close_ones, three.bool(), torch.tensor([1], device=device))
    assert done.tolist() == [[False, False, True]], "confidences next to 1 were not told apart"
