"""How likely an answer is to a diffusion model: a mean over masked copies of it.

After Nie et al., "Large Language Diffusion Models", 2025, algorithm 3. Of an answer of L tokens l are
masked, l uniform in 1..L and every choice of l tokens equally likely. The mean of L / l times the sum
of the log-probabilities of the masked tokens is a lower bound of the answer's log-likelihood; it is
estimated from a number of such copies, or taken over all of them where there are no more than that.

In a block-causal model it is the sum of such bounds of the blocks from left to right, each with what stands before it
known and nothing behind it seen (Arriola et al., "Block Diffusion", 2025). A last block that is not full is filled up
with masks, as while it is generated; a token that the block before predicts (Fast-dLLM v2, Nemotron) is a part of its
own.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, islice
from math import comb
from typing import Any

import torch
from torch import Tensor

from dkv.core.blocks import blocks_of
from dkv.core.kv_cache import KVCache
from dkv.core.varlen import Segments
from dkv.engine.generate import generate
from dkv.engine.in_blocks import block_rule
from dkv.engine.output import Stats
from dkv.engine.sampler import LOGITS_AT_A_TIME
from dkv.models.gemma_spec import GemmaSpec
from dkv.tools.text import padded

# Token ids of a prompt, and of an answer to it.
Question = tuple[Sequence[int], Sequence[int]]


def log_likelihoods(
    model: Any,
    questions: Sequence[Question],
    *,
    samples: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    stats: Stats | None = None,
) -> Iterator[tuple[int, float]]:
    """The log-likelihood of each answer after its prompt, in nats.

    A value depends on the seed, the prompt and the answer, and on nothing else. Answers of one length
    to one prompt are masked at the same places, so that choices are compared like with like.

    Args:
        model: from `dkv.load` or `dkv.wrap`.
        questions: prompts and answers as token ids. An answer without tokens has likelihood 1.
        samples: masked copies of an answer, or of each of its blocks. If it has no more than these (2^L - 1 for L
            tokens; one for a single token), all are used, and the mean is exact.
        batch_size: copies in a pass.
        seed: of the places that are masked.
        stats: where to count the passes.

    Yields:
        (index of the question, value), each as soon as it is known, long questions first.

    Raises:
        ValueError: a question does not fit the model, samples or batch_size is below 1, or the logits
            hold NaN.

    Example:
        >>> values = dict(log_likelihoods(model, [(prompt, yes), (prompt, no)]))
    """
    _check(model, questions, samples=samples, batch_size=batch_size)
    stats = Stats() if stats is None else stats
    values = [0.0] * len(questions)
    left = [
        sum(min(2 ** len(part.own) - 1, samples) for part in _parts(model.spec, len(prompt), len(answer)))
        for prompt, answer in questions
    ]
    yield from ((i, 0.0) for i, copies in enumerate(left) if copies == 0)
    copies = _copies(model.spec, questions, samples, seed)
    for copy, terms in terms_of(model, copies, batch_size, stats):
        for owner, term in terms:
            values[owner] += term
        for owner in copy.owners:
            left[owner] -= 1
            if left[owner] == 0:
                yield owner, values[owner]


def are_greedy(model: Any, questions: Sequence[Question], *, batch_size: int = 32) -> Iterator[tuple[int, bool]]:
    """Whether the model itself gives each answer: as many slots, the most confident token at every step.

    Args, yields and raises as `log_likelihoods`, with a truth value for each question.
    """
    _check(model, questions, batch_size=batch_size)
    asked: dict[int, dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (prompt, answer) in enumerate(questions):
        asked[len(answer)][tuple(prompt)].append(i)
    yield from ((i, True) for owners in asked.pop(0, {}).values() for i in owners)
    for length, owners in asked.items():
        prompts = iter(sorted(owners, key=len, reverse=True))
        while batch := list(islice(prompts, batch_size)):
            ids, mask = (t.to(model.device) for t in padded(batch, left=True))
            how = {"block_length": length} if model.spec.attention == "full" else {"eos_token_id": []}
            output = generate(model, ids, mask, max_new_tokens=length, seed=0, **how)
            for prompt, given in zip(batch, output.sequences[:, ids.shape[1] :].tolist(), strict=True):
                yield from ((i, given == list(questions[i][1])) for i in owners[prompt])


@dataclass(frozen=True)
class Copy:
    """A sequence in which some tokens are masked.

    Attributes:
        tokens: all of it, the mask id where a token is masked.
        reads: (slot, token, owner): the probability of which token is wanted where, for which question.
        owners: the questions; several only if the masks leave no difference between them.
        weight: what the log-probabilities are multiplied with.
        first: in a block-causal model the first slot of the last block.
        offset: in such a model, what is added to a slot before it is divided by the length of a block.
        shift: the output that predicts a slot is so many slots before it.
    """

    tokens: list[int]
    reads: list[tuple[int, int, int]]
    owners: list[int]
    weight: float
    first: int = 0
    offset: int = 0
    shift: int = 0


@dataclass(frozen=True)
class Part:
    """Slots `own` of an answer that are masked together in a text of `size` slots, whose last block begins at `first`;
    outputs predict what stands `shift` slots behind them."""

    own: Sequence[int]
    size: int
    first: int
    shift: int


def _parts(spec: Any, start: int, length: int) -> list[Part]:
    """An answer of `length` tokens from slot `start` on: all of it at once, or block by block."""
    own, rule = range(start, start + length), block_rule(spec)
    if rule is None or not length:
        return [Part(own, start + length, 0, int(spec.shifted))] if length else []
    most = start + length + rule.extra(start, length)
    return [
        Part(slots, first if seed else min(end, most), first, int(seed or spec.shifted))
        for seed, first, end, slots in blocks_of(own, rule, rule.length)
    ]


def _copies(spec: Any, questions: Sequence[Question], samples: int, seed: int) -> Iterator[Copy]:
    """All copies of all questions, those of one question together."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, (prompt, answer) in enumerate(questions):
        # Choices of one token differ in nothing but what is read: one pass serves them all.
        groups[tuple(prompt) if len(answer) == 1 else i].append(i)
    # What takes the most memory comes first.
    for owners in sorted(groups.values(), key=lambda group: -sum(map(len, questions[group[0]]))):
        prompt, answer = questions[owners[0]]
        start, mask, rule = len(prompt), spec.mask_token_id, block_rule(spec)
        rng, offset = random.Random(f"{seed} {len(answer)} {list(prompt)}"), rule.offset(start) if rule else 0
        for part in _parts(spec, start, len(answer)):
            text = [*prompt, *answer, *[mask] * part.size][: part.size]
            for slot in range(part.own[-1] + 1, part.size):
                text[slot] = mask
            for places, weight in masked_places(len(part.own), samples, rng):
                slots = [part.own[i] for i in places]
                hidden = set(slots)
                tokens = [mask if slot in hidden else token for slot, token in enumerate(text)]
                reads = [(slot, questions[owner][1][slot - start], owner) for owner in owners for slot in slots]
                yield Copy(tokens, reads, owners, weight, part.first, offset, part.shift)


def masked_places(length: int, samples: int, rng: random.Random) -> list[tuple[set[int], float]]:
    """Which of `length` tokens a copy masks, and its weight; the weighted sums add up to the estimate."""
    if 2**length - 1 <= samples:
        return [
            (set(places), 1 / (count * comb(length, count)))
            for count in range(1, length + 1)
            for places in combinations(range(length), count)
        ]
    # Each count is uniform by the random start; together they are spread evenly, which lowers the variance.
    first = rng.randrange(length)
    counts = [(first + i * length // samples) % length + 1 for i in range(samples)]
    return [(set(rng.sample(range(length), count)), length / (count * samples)) for count in counts]


def terms_of(
    model: Any, copies: Iterable[Copy], batch_size: int, stats: Stats
) -> Iterator[tuple[Copy, list[tuple[int, float]]]]:
    """Every copy with (owner, weighted log-probability) of each of its reads; `batch_size` copies make a pass."""
    copies = iter(copies)
    while batch := list(islice(copies, batch_size)):
        found = iter(log_probabilities(model, batch, stats).tolist())
        for copy in batch:
            yield copy, [(owner, copy.weight * next(found)) for _, _, owner in copy.reads]


@torch.no_grad()
def log_probabilities(model: Any, copies: list[Copy], stats: Stats) -> Tensor:
    """Float [n]: the log-probability of every read of the copies, one copy after the other."""
    spec, device, lengths = model.spec, model.device, [len(copy.tokens) for copy in copies]
    tokens, real = (t.to(device) for t in padded([copy.tokens for copy in copies]))
    size, rule = max(lengths), block_rule(spec)
    begin, owners, positions = _starts(lengths), *real.bool().nonzero(as_tuple=True)
    segments = Segments(torch.tensor(begin, device=device), torch.tensor(lengths, device=device), size)
    counts = [len(copy.reads) for copy in copies]
    outputs = [at + slot - copy.shift for at, copy in zip(begin, copies, strict=True) for slot, _, _ in copy.reads]
    wanted = Segments(torch.tensor(_starts(counts), device=device), torch.tensor(counts, device=device), max(counts))
    ends = None
    if rule is not None:
        of = (torch.tensor([getattr(copy, name) for copy in copies], device=device) for name in ("offset", "first"))
        ends = rule.ends(positions, *(x.index_select(0, owners) for x in of))
    targets = torch.tensor([token for copy in copies for _, token, _ in copy.reads], device=device)
    ranges = None if min(lengths) == size else torch.tensor([[0, length] for length in lengths], device=device)
    hidden = model.step(
        tokens[owners, positions],
        positions,
        KVCache(len(copies), size),
        rows=owners,
        segments=segments,
        key_ranges=ranges,
        ends=ends,
        outputs=torch.tensor(outputs, device=device),
        output_segments=wanted,
    )
    at_a_time = max(1, LOGITS_AT_A_TIME // spec.vocab_size)
    found = []
    for part, target in zip(hidden.split(at_a_time), targets.split(at_a_time), strict=True):
        logits = model.head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(logits.gather(1, target[:, None]).flatten() - logits.logsumexp(1))
    stats.passes += 1
    stats.full_passes += 1
    stats.computed_slots += sum(lengths)
    stats.total_slots += sum(lengths)
    values = torch.cat(found)
    if bool(values.isnan().any()):
        raise ValueError("the model's logits hold NaN or infinity: check the weights, and the dtype")
    return values


def _starts(counts: list[int]) -> list[int]:
    """Where each of some parts begins, one after the other."""
    return [0, *accumulate(counts)][:-1]


def _check(model: Any, questions: Sequence[Question], **counts: int) -> None:
    spec = model.spec
    if isinstance(spec, GemmaSpec):
        raise ValueError(
            "DiffusionGemma has no masks, so what it gives a text is no bound of this kind: its likelihood is not "
            "defined here"
        )
    if spec.attention != "full" and spec.block_length is None:
        raise ValueError("this model does not say how long its blocks are: load it with attention_block=")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for i, (prompt, answer) in enumerate(questions):
        sizes = [part.size for part in _parts(spec, len(prompt), len(answer))]
        if max([len(prompt), *sizes]) > spec.max_positions:
            raise ValueError(
                f"question {i} has a prompt of {len(prompt)} and an answer of {len(answer)} tokens, "
                f"the model has {spec.max_positions} positions: shorten the prompt"
            )
        if spec.shifted and not prompt:
            raise ValueError(f"question {i} has no prompt: this model predicts a token from the slot before it")
        if odd := [token for token in (*prompt, *answer) if not 0 <= token < spec.vocab_size]:
            raise ValueError(f"question {i} has the id {odd[0]}, the model's vocabulary ends at {spec.vocab_size - 1}")
