"""The eager baseline of the families of 2026: generation that costs what their published loops cost, on dkv's weights.

Own code, after a reading of these loops: dllm (LLaDA2.0 and 2.1, A2D's MDLM and BD3LM), JetAstra/SDAR, a copy of
Fast-dLLM v2, ML-GSAI/LLaDA, and NVIDIA's Nemotron. It gives the tokens of `dkv.generate` and keeps the work that dkv
leaves out: what is computed again, passes of their own for what is only stored, logits of every slot of every pass,
and keys and values that are concatenated anew in every layer of every pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import Any

import torch
from torch import Tensor

import dkv
from dkv.bench.baselines.decoder import forward
from dkv.core.blocks import slot_schedule
from dkv.engine import in_blocks
from dkv.engine.config import DiffusionConfig
from dkv.models import ModelSpec, Transformer

# Whose loops compute what stands before the block in every pass, and once in every block; those of others store it.
EVERY_PASS, EVERY_BLOCK = ("llada2",), ("a2d-qwen3", "a2d-qwen2", "a2d-llama")
Kept = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Part:
    """Slots that are filled together: those from `begin` to `stop`, in the block from `first` to `end`.

    `counts` says how many each pass fills, with a threshold at the least. A block without slots is a seed: the slot
    `end` takes the token that the slot before it predicts.
    """

    first: int
    end: int
    begin: int
    stop: int
    counts: tuple[int, ...]


@torch.no_grad()
def generate(model: Transformer, input_ids: Tensor, *, new: int, **settings: Any) -> tuple[Tensor, int, int]:
    """Continue one prompt; the tokens are those of `dkv.generate` with the same settings and `eos_token_id=[]`.

    Args:
        model: of any family with one transformer, its weights in `nn.Linear`.
        input_ids: integers [1, P].
        new: slots to fill.
        settings: `steps`, `block_length`, `quotas`, `threshold`, `edit_threshold`, `post_steps`, `schedule`,
            `confidence="sequential"`; and for Fast-dLLM v2 its block cache, `cache="dual"`.

    Returns:
        int64 [1, P + new], the number of passes, and how many slots they computed together.

    Raises:
        ValueError: more than one row, or a cache that the published loop does not have.
    """
    spec, prompt = model.spec, input_ids.shape[1]
    config = DiffusionConfig(max_new_tokens=new, **settings)
    in_blocks.check(spec, config)
    if len(input_ids) != 1:
        raise ValueError(f"input_ids must be one row, as in the published loops, got {len(input_ids)}")
    if not isinstance(config.cache, dkv.NoCache) and not (spec.seeded and isinstance(config.cache, dkv.DualCache)):
        raise ValueError(f"cache must be none, or dual in Fast-dLLM v2, as published, got {config.cache.name!r}")
    rule = in_blocks.block_rule(spec, config)
    extra = 0 if rule is None else rule.extra(prompt, new)
    if config.schedule == "speculative":
        extra = rule.length
    x = torch.cat((input_ids, input_ids.new_full((1, new + extra), spec.mask_token_id)), 1)
    loop = Loop(model, x, config, prompt)
    if config.schedule == "speculative":
        loop.speculate(new)
    else:
        loop.run(parts_of(spec, config, prompt, x.shape[1]))
    return x[:, : prompt + new], loop.passes, loop.slots


def parts_of(spec: ModelSpec, config: DiffusionConfig, prompt: int, size: int) -> Iterator[Part]:
    """The parts of a canvas of `size` slots, from left to right."""
    rule = in_blocks.block_rule(spec, config)
    if rule is None:
        for _, steps in groupby(config.plan(shifted=False), lambda step: step.block):
            first, *_ = steps = list(steps)
            yield Part(0, size, prompt + first.start, prompt + first.stop, tuple(step.count for step in steps))
        return
    asked = config.block_length or rule.length, config.steps, config.quotas == "rounded"
    for _, steps in groupby(slot_schedule(range(prompt, size), size, rule, *asked), lambda step: step.block):
        first, *_ = steps = list(steps)
        counts = tuple(step.least for step in steps)
        yield Part(first.first, first.end, first.part, min(first.part_end, size), counts)


class Loop:
    """A generation of one row.

    Args:
        model, config, prompt: as for `generate`.
        x: int64 [1, L], the canvas, which is filled in place.

    Attributes:
        passes, slots: that went through the network.
        kept: by layer, keys and values of the slots before `stored`; `block`: of those of the block, from there on.
        last: [1, 1, V], logits of the last slot before `stored`.
    """

    def __init__(self, model: Transformer, x: Tensor, config: DiffusionConfig, prompt: int):
        self.model, self.x, self.config, self.prompt = model, x, config, prompt
        self.passes = self.slots = self.stored = 0
        self.kept: Kept = {}
        self.block: Kept = {}
        self.last: Tensor | None = None
        spec = model.spec
        self.cached = isinstance(config.cache, dkv.DualCache)
        self.anew = spec.attention == "full" or spec.family in EVERY_PASS
        self.copies = spec.family in EVERY_BLOCK
        self.slot = torch.arange(x.shape[1], device=x.device)
        self.visible = None
        if spec.attention != "full":
            rule = in_blocks.block_rule(spec, config)
            block = self.slot if rule.causal else (self.slot + rule.offset(prompt)) // rule.length
            self.visible = torch.zeros(block.shape * 2, dtype=model.dtype, device=x.device)
            self.visible.masked_fill_(block > block[:, None], -torch.inf)

    def run(self, parts: Iterator[Part]) -> None:
        """Fill all parts, one after the other."""
        for part in parts:
            if not self.anew and self.stored < part.first:
                self.store(part.first)
            if part.first == part.end:
                self.x[:, part.end] = self._guess(self.last)[:, 0]
            elif self.config.edit_threshold is None:
                self._fill_all(part)
            else:
                self._edit_all(part)
        if not self.anew and not self.copies:
            # What stores the last block is made, too, though nothing follows.
            self.store(self.x.shape[1])

    def _fill_all(self, part: Part) -> None:
        for count in part.counts:
            open_ = self._open(part)
            if not open_.any():
                return
            self.fill(part, self.logits(part), open_, count)

    def _edit_all(self, part: Part) -> None:
        """LLaDA2.1: go on until nothing changes, or for so many passes once there is no mask."""
        post = 0
        for count in repeat(part.counts[0]):
            open_ = self._open(part)
            post += not open_.any()
            if post > self.config.post_steps:
                return
            if not self.fill(part, self.logits(part), open_, count) and post:
                return

    def store(self, end: int) -> None:
        """A pass over what stands before `end`, whose keys and values stay; what is copied is first made anew."""
        begin = 0 if self.copies else self.stored
        self.kept, self.block = {} if self.copies else self.kept, {}
        logits = self._pass(begin, end, self._append, self.visible[begin:end, :end])
        self.last, self.stored = logits[:, -1:], end

    def logits(self, part: Part) -> Tensor:
        """[1, n, V] of the slots of the part; of a canvas that is seen as a whole, of all slots."""
        if self.anew:
            mask = None if self.visible is None else self.visible[: part.end, : part.end]
            begin, logits = 0, self._pass(0, part.end, lambda layer, key, value: (key, value), mask)
        elif self.cached and self.block and not self._open(part)[0]:
            begin = part.begin
            logits = self._pass(begin, part.stop, lambda *fresh: self._within(begin - part.first, *fresh))
        else:
            begin, logits = part.first, self._pass(part.first, part.end, self._beside)
        if self.model.spec.shifted:
            before = logits[:, :1] if self.last is None else self.last
            logits = torch.cat((before, logits[:, :-1]), 1)
        return logits if self.visible is None else logits[:, part.begin - begin : part.stop - begin]

    def fill(self, part: Part, logits: Tensor, open_: Tensor, count: int) -> bool:
        """Fill the open slots that are sure enough, or else the `count` surest; returns whether any was edited."""
        config, here = self.config, slice(0, None) if self.visible is None else slice(part.begin, part.stop)
        probability, slot = logits.softmax(-1), self.slot[here]
        guess = self._guess(logits)
        sure = probability.gather(-1, guess.unsqueeze(-1)).squeeze(-1)[0]
        rank = -slot.float() if config.confidence == "sequential" else sure
        rank = torch.where(open_, rank, -torch.inf)
        chosen = torch.zeros_like(open_) if config.threshold is None else rank >= config.threshold
        if int(chosen.sum()) < count:
            chosen = torch.zeros_like(open_)
            chosen[rank.topk(min(count, int(open_.sum()))).indices] = True
        edits = torch.zeros_like(open_)
        if config.edit_threshold is not None:
            edits = ~open_ & (slot >= self.prompt) & (guess[0] != self.x[0, here]) & (sure > config.edit_threshold)
        self.x[0, here] = torch.where(chosen | edits, guess[0], self.x[0, here])
        return bool(edits.any())

    def speculate(self, new: int) -> None:
        """Nemotron's `linear_spec`: blocks are drafts, of which a causal pass keeps what it would have written."""
        length, at = self.model.spec.block_length, self.prompt
        self.store(at)
        self.x[:, at] = self._guess(self.last)[:, 0]
        while at + 1 < self.prompt + new:
            part = Part(at, at + length, at, at + length, (1,) * length)
            self._fill_all(part)
            drafts = self.x[0, at + 1 : at + length].clone()
            written = self._guess(self._pass(at, part.end, self._append, self.visible[at : part.end, : part.end]))[0]
            taken = int((drafts == written[:-1]).long().cumprod(0).sum()) + 1
            self.x[0, at + 1 :] = self.model.spec.mask_token_id
            self.x[0, at + 1 : at + taken + 1] = written[:taken]
            at = self.stored = at + taken
            self.kept = {layer: tuple(t[:, :, :at] for t in pair) for layer, pair in self.kept.items()}

    def _open(self, part: Part) -> Tensor:
        """bool [n]: which of the slots that `fill` is told of have no token and may take one."""
        masks = self.x[0] == self.model.spec.mask_token_id
        return masks & (self.slot < part.stop) if self.visible is None else masks[part.begin : part.stop]

    def _guess(self, logits: Tensor) -> Tensor:
        """The best tokens, of which the mask is none; changes the logits."""
        logits[..., self.model.spec.mask_token_id] = -torch.inf
        return logits.argmax(-1)

    def _pass(self, begin: int, end: int, join: Any, visible: Tensor | None = None) -> Tensor:
        self.passes, self.slots = self.passes + 1, self.slots + end - begin
        return forward(self.model, self.x[:, begin:end], begin, join, visible)

    def _append(self, layer: int, *fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh keys and values behind those that are kept, and kept from now on."""
        self.kept[layer] = self._behind(layer, fresh)
        return self.kept[layer]

    def _beside(self, layer: int, *fresh: Tensor) -> tuple[Tensor, Tensor]:
        """The same for this pass alone; a cache of the block keeps them until that is full."""
        if self.cached:
            self.block[layer] = fresh
        return self._behind(layer, fresh)

    def _within(self, offset: int, layer: int, *fresh: Tensor) -> tuple[Tensor, Tensor]:
        """The block with fresh keys and values in their places."""
        for old, t in zip(self.block[layer], fresh, strict=True):
            old[:, :, offset : offset + t.shape[2]] = t
        return self._behind(layer, self.block[layer])

    def _behind(self, layer: int, fresh: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        kept = self.kept.get(layer)
        if kept is None:
            return fresh
        if self.copies:
            kept = tuple(t.clone() for t in kept)
        return tuple(torch.cat(pair, 2) for pair in zip(kept, fresh, strict=True))
