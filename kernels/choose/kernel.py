"""The kernels of the choice: of logits, of hidden states, and the merge of the parts of the vocabulary.

The state of a row, over the columns seen so far, is a tuple of [R] tensors:
    top        the largest logit, of ids that may be chosen and of others
    tail       the sum of exp(f) without one largest, where f = (x - top) / temperature: next to a probability of
               almost 1 it keeps its digits
    weighed    for an entropy, the sum of f * exp(f)
    second     for a margin, the second best logit that may be chosen
    best       the largest logit that may be chosen
    token      its lowest id
    noisy      with noise, the largest sum of a scaled logit and scaled noise
    drawn      its lowest id
    drawn_x    its logit

C is known at compile time: the RULE; whether an ENTROPY is worked out; whether logits are TEMPERED; KEYS columns of
`row_keys`, 0 where nothing is drawn; PARTS of the vocabulary; tiles of BLOCK_R rows, BLOCK_V ids and BLOCK_D numbers of
a hidden state, of which the size is a multiple if EVEN; PRECISION and STAGES of the product. `heat` is (temperature of
the confidence, factor of a logit, factor of its noise).
"""

import triton
import triton.language as tl

from dkv.kernels.common.noise import START

START_A, START_B = (tl.constexpr(start) for start in START)
FLOATS = tl.constexpr(7)  # of a state in memory: top, tail, weighed, second, best, noisy, drawn_x
IDS = tl.constexpr(2)  # token, drawn
LAST = tl.constexpr(2**31 - 1)
FAR = tl.constexpr(-1e4)  # its exponential is 0, and 0 times it is 0, unlike -inf


@triton.jit
def log1p(x):
    """log(1 + x) with the digits of a small x: the rounding of 1 + x is divided out again."""
    one_more = 1.0 + x
    rounded = one_more - 1.0
    return tl.where(rounded == 0.0, x, tl.log(one_more) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def mix(x):
    """`dkv.kernels.common.noise._mix` on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_hash(row_keys, r, inside, KEYS: tl.constexpr):
    """`dkv.kernels.common.noise.row_hash` of the rows r [R] as uint32."""
    a, b = tl.full(r.shape, START_A, tl.uint32), tl.full(r.shape, START_B, tl.uint32)
    for place in tl.static_range(KEYS):
        at = row_keys.ptr + r * row_keys.stride[0] + place * row_keys.stride[1]
        key = tl.load(at, mask=inside, other=0)  # [R]
        low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
        a, b = mix(a ^ low) + 0x68BC21EB, mix(b ^ low) + 0x02E5BE93
        a, b = mix(a ^ high) + 0x68BC21EB, mix(b ^ high) + 0x02E5BE93
    return a, b


@triton.jit
def uniform(a, b, column):
    """`dkv.kernels.common.noise.uniform` [R, V] of the hashes a and b [R] and the columns [V]: the same numbers."""
    bits = mix(mix(a[:, None] + column.to(tl.uint32)[None, :]) ^ b[:, None])
    return (bits.to(tl.float32) + 0.5) * (2.0**-32 - 2.0**-56)


@triton.jit
def gumbel(a, b, column):
    return -tl.log(-log1p(-uniform(a, b, column)))


@triton.jit
def fresh(C):
    """The state of rows of which nothing has been seen."""
    nothing, zero = tl.full((C.BLOCK_R,), float("-inf"), tl.float32), tl.zeros((C.BLOCK_R,), tl.float32)
    none = tl.zeros((C.BLOCK_R,), tl.int32)
    return nothing, zero, zero, nothing, nothing, none, nothing, none, nothing


@triton.jit
def cooled(difference, heat, C):
    """A difference of logits over the temperature, which may overflow to -inf where logits would to +inf."""
    if C.TEMPERED:
        difference = tl.div_rn(difference, heat[0])
    return difference


@triton.jit
def absorb(state, x, column, limit, heat, a, b, C, BANNED: tl.constexpr):
    """The state after the logits x [R, V] of ids `column` [V], each greater than all before it; -inf for no id."""
    top, tail, weighed, second, best, token, noisy, drawn, drawn_x = state
    x = tl.where(x == x, x, float("inf"))  # a maximum may drop NaN, and +inf ends as NaN
    allowed = column < limit
    for i in tl.static_range(len(BANNED)):
        allowed = allowed & (column != BANNED[i])
    open_x = tl.where(allowed[None, :], x, float("-inf"))  # [R, V]
    here = tl.max(open_x, 1)
    place = tl.min(tl.where(open_x == here[:, None], column[None, :], LAST), 1)
    if C.KEYS:
        score = tl.where(open_x > float("-inf"), open_x * heat[1] + gumbel(a, b, column) * heat[2], float("-inf"))
        score_here = tl.max(score, 1)
        drawn_here = tl.min(tl.where(score == score_here[:, None], column[None, :], LAST), 1)
        x_here = tl.max(tl.where(column[None, :] == drawn_here[:, None], open_x, float("-inf")), 1)
        wins = score_here > noisy
        drawn, drawn_x = tl.where(wins, drawn_here, drawn), tl.where(wins, x_here, drawn_x)
        noisy = tl.where(wins, score_here, noisy)
    if C.RULE == "margin":
        second_here = tl.max(tl.where(column[None, :] == place[:, None], float("-inf"), open_x), 1)
        second = tl.maximum(tl.maximum(second, second_here), tl.minimum(best, here))
    token, best = tl.where(here > best, place, token), tl.maximum(best, here)

    high = tl.maximum(top, tl.max(x, 1))
    shift = tl.where(tl.abs(high) == float("inf"), 0.0, high)
    far = tl.maximum(cooled(x - shift[:, None], heat, C), FAR)  # [R, V]
    fell = tl.maximum(cooled(top - shift, heat, C), FAR)  # [R]
    # Those equal to the top are counted, so that one of them can be left out without a subtraction from the sum.
    is_top, lost = x == shift[:, None], high > top
    weight, keep = tl.where(is_top, 0.0, tl.exp(far)), tl.exp(fell)
    if C.ENTROPY:
        weighed = keep * (weighed + fell * (1.0 + tail)) + tl.sum(weight * far, 1)
    others = tl.sum(tl.where(is_top, 1, 0), 1) - tl.where(lost, 1, 0)
    tail = tl.where(lost, keep * (1.0 + tail), tail) + tl.sum(weight, 1) + others.to(tl.float32)
    return high, tail, weighed, second, best, token, noisy, drawn, drawn_x


@triton.jit
def store(state, floats, ids, r, inside, part, C):
    """Write the state of the rows r over one part of the vocabulary."""
    top, tail, weighed, second, best, token, noisy, drawn, drawn_x = state
    floats_at, ids_at = floats + (r * C.PARTS + part) * FLOATS, ids + (r * C.PARTS + part) * IDS
    tl.store(floats_at, top, mask=inside)
    tl.store(floats_at + 1, tail, mask=inside)
    if C.ENTROPY:
        tl.store(floats_at + 2, weighed, mask=inside)
    if C.RULE == "margin":
        tl.store(floats_at + 3, second, mask=inside)
    tl.store(floats_at + 4, best, mask=inside)
    tl.store(ids_at, token, mask=inside)
    if C.KEYS:
        tl.store(floats_at + 5, noisy, mask=inside)
        tl.store(floats_at + 6, drawn_x, mask=inside)
        tl.store(ids_at + 1, drawn, mask=inside)


# How many rows there are bounds masks alone: no kernel of its own for a multiple of 16.
@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    floats,
    ids,
    token_out,
    confidence_out,
    entropy_out,
    rows,
    heat,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Token, log-confidence and, where there is an output for it, entropy of the rows from the states of the parts of
    the vocabulary; grid (tiles of rows,).
    """
    r, part = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    inside = (r < rows)[:, None] & (part < C.PARTS)[None, :]  # [R, P], as is all that is loaded
    at = r[:, None] * C.PARTS + part[None, :]
    floats, ids = floats + at * FLOATS, ids + at * IDS
    top = tl.load(floats, mask=inside, other=float("-inf"))
    tail = tl.load(floats + 1, mask=inside, other=0.0)
    best = tl.load(floats + 4, mask=inside, other=float("-inf"))
    token = tl.load(ids, mask=inside, other=LAST)

    high, first = tl.max(top, 1), tl.max(best, 1)  # [R]
    chosen, place = first, tl.min(tl.where(best == first[:, None], token, LAST), 1)
    is_first = token == place[:, None]
    if C.KEYS:
        noisy = tl.load(floats + 5, mask=inside, other=float("-inf"))
        drawn = tl.load(ids + 1, mask=inside, other=LAST)
        drawn_x = tl.load(floats + 6, mask=inside, other=float("-inf"))
        highest = tl.max(noisy, 1)
        place = tl.min(tl.where(noisy == highest[:, None], drawn, LAST), 1)
        is_drawn = (noisy == highest[:, None]) & (drawn == place[:, None])
        chosen = tl.max(tl.where(is_drawn, drawn_x, float("-inf")), 1)

    shift = tl.where(tl.abs(high) == float("inf"), 0.0, high)
    fell = tl.maximum(cooled(top - shift[:, None], heat, C), FAR)
    keep = tl.exp(fell)
    winner = tl.min(tl.where(top == high[:, None], part[None, :], LAST), 1)
    total = tl.sum(tl.where(part[None, :] == winner[:, None], tail, keep * (1.0 + tail)), 1)
    log_total = log1p(total)
    # NaN where nothing can be chosen, or a logit is +inf or NaN; infinities are not subtracted.
    usable = (first > float("-inf")) & (high < float("inf"))
    first, chosen, high = tl.where(usable, first, 0.0), tl.where(usable, chosen, 0.0), tl.where(usable, high, 0.0)
    if C.ENTROPY:
        weighed = tl.load(floats + 2, mask=inside, other=0.0)
        sum_p_log_p = tl.sum(keep * (weighed + fell * (1.0 + tail)), 1) / (1.0 + total) - log_total
        if entropy_out is not None:
            tl.store(entropy_out + r, tl.where(usable, tl.abs(sum_p_log_p), float("nan")), mask=r < rows)
    if C.RULE == "entropy":
        confidence = sum_p_log_p
    elif C.RULE == "margin":
        second = tl.max(tl.load(floats + 3, mask=inside, other=float("-inf")), 1)
        second = tl.maximum(second, tl.max(tl.where(is_first, float("-inf"), best), 1))
        apart = log1p(-tl.exp(cooled(second - first, heat, C)))
        confidence = cooled(first - high, heat, C) - log_total + apart
    else:
        confidence = cooled(chosen - high, heat, C) - log_total
    tl.store(token_out + r, place.to(tl.int64), mask=r < rows)
    tl.store(confidence_out + r, tl.where(usable, confidence, float("nan")), mask=r < rows)


@triton.jit
def _logits(x, weight, scales, bias, r, column, first_column, rows, vocabulary, size, C):
    """A tile of logits [R, V] in float32: x or x @ weight.T, in 8 bits times scales, plus bias; -inf for no id."""
    inside, known = (r < rows)[:, None], (column < vocabulary)[None, :]
    column = column.to(tl.int64)
    if weight is None:
        at = x.ptr + r[:, None] * x.stride[0] + (column - first_column)[None, :] * x.stride[1]
        logits = tl.load(at, mask=inside & known, other=float("-inf")).to(tl.float32)
    else:
        d = tl.arange(0, C.BLOCK_D)
        far_d = d.to(tl.int64)
        x_at = x.ptr + r[:, None] * x.stride[0] + far_d[None, :] * x.stride[1]  # [R, D]
        weight_at = weight.ptr + column[None, :] * weight.stride[0] + far_d[:, None] * weight.stride[1]  # [D, V]
        logits = tl.zeros((C.BLOCK_R, C.BLOCK_V), tl.float32)
        for start in tl.range(0, size, C.BLOCK_D, num_stages=C.STAGES):
            of_rows, of_ids = inside, known
            if not C.EVEN:
                of_rows, of_ids = of_rows & (d < size - start)[None, :], of_ids & (d < size - start)[:, None]
            h, w = tl.load(x_at, mask=of_rows, other=0.0), tl.load(weight_at, mask=of_ids, other=0)
            # All dtypes hold the whole numbers of 8 bits exactly.
            logits = tl.dot(h, w.to(h.dtype), logits, input_precision=C.PRECISION)
            x_at += x.stride[1] * C.BLOCK_D
            weight_at += weight.stride[1] * C.BLOCK_D
    if scales is not None:
        logits *= tl.load(scales.ptr + column[None, :] * scales.stride[0], mask=known, other=0.0)
    if bias is not None:
        logits += tl.load(bias.ptr + column[None, :] * bias.stride[0], mask=known, other=0.0).to(tl.float32)
    return tl.where(known, logits, float("-inf"))


@triton.jit(do_not_specialize=["rows"])
def choose_kernel(
    x,
    weight,
    scales,
    bias,
    row_keys,
    floats,
    ids,
    rows,
    vocabulary,
    size,
    limit,
    tiles,
    first_column,
    heat,
    C,
    BANNED: tl.constexpr,
):
    """The state of a tile of rows over one part of the vocabulary, `tiles` tiles; grid (tiles of rows, parts).

    x holds hidden states of `size` numbers if `weight`, the head, is given, with `scales` in 8 bits, else logits: from
    `first_column` on, with which a part begins, to the end of the last part of the grid.
    """
    r = tl.program_id(0).to(tl.int64) * C.BLOCK_R + tl.arange(0, C.BLOCK_R)
    part = first_column // (tiles * C.BLOCK_V) + tl.program_id(1)
    a, b = row_hash(row_keys, r, r < rows, C.KEYS)
    state = fresh(C)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(vocabulary, C.BLOCK_V))):
        column = tile * C.BLOCK_V + tl.arange(0, C.BLOCK_V)  # [V]
        logits = _logits(x, weight, scales, bias, r, column, first_column, rows, vocabulary, size, C)
        state = absorb(state, logits, column, limit, heat, a, b, C, BANNED)
    store(state, floats, ids, r, r < rows, part, C)
